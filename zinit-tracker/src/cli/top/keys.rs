//! What keys do.

use std::ops::Range;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::{
    list::Step,
    state::{Action, Events, Over, Place, Processes, State, Text},
};
use crate::cli::output;

/// Every key, for the help.
pub(super) const HELP: [(&str, &str); 13] = [
    ("↑ ↓ PgUp PgDn Home End", "go through the list (k j g G too)"),
    ("Enter →", "show the processes of the service"),
    ("Esc ←", "back; also ends the filter"),
    ("s", "stop the service: shows whom it signals, and asks"),
    ("r", "release the process with its descendants, asks"),
    ("e", "follow the events of the service"),
    ("/", "show only what contains a text"),
    ("o", "order by the next column"),
    ("O", "turn the order of services round"),
    ("?", "this help"),
    ("Ctrl-L", "draw the screen anew"),
    ("Ctrl-Z", "suspend"),
    ("q Ctrl-C", "quit"),
];

/// Does what a key does; what takes the machine is returned.
pub(super) fn press(state: &mut State, key: KeyEvent) -> Option<Action> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    state.message = None;
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return match key.code {
            KeyCode::Char('c') => Some(Action::Quit),
            KeyCode::Char('z') => Some(Action::Suspend),
            _ => None,
        };
    }
    if state.over.is_some() {
        return over(state, key.code);
    }
    if state.typing {
        typed(state, key.code);
        return None;
    }
    if let Some(step) = step(key.code) {
        go(state, step);
        return None;
    }
    match key.code {
        KeyCode::Char('q') => return quit(state),
        KeyCode::Char('?' | 'h') => state.over = Some(Over::Help),
        KeyCode::Enter | KeyCode::Right => enter(state),
        KeyCode::Esc | KeyCode::Left => return back(state),
        KeyCode::Char('/') => state.typing = !matches!(state.place, Place::Events(_)),
        KeyCode::Char('o') => match &mut state.place {
            Place::Services => state.order = state.order.next(),
            Place::Processes(processes) => processes.order = processes.order.next(),
            Place::Events(_) => {}
        },
        KeyCode::Char('O') => state.reversed = !state.reversed,
        KeyCode::Char('s') => return preview(state),
        KeyCode::Char('r') => release(state),
        KeyCode::Char('e') => return follow(state),
        _ => {}
    }
    None
}

fn step(code: KeyCode) -> Option<Step> {
    Some(match code {
        KeyCode::Up | KeyCode::Char('k') => Step::Up,
        KeyCode::Down | KeyCode::Char('j') => Step::Down,
        KeyCode::PageUp => Step::PageUp,
        KeyCode::PageDown | KeyCode::Char(' ') => Step::PageDown,
        KeyCode::Home | KeyCode::Char('g') => Step::Home,
        KeyCode::End | KeyCode::Char('G') => Step::End,
        _ => return None,
    })
}

fn over(state: &mut State, code: KeyCode) -> Option<Action> {
    let text = match state.over.as_mut()? {
        Over::Help => {
            state.over = None;
            return None;
        }
        Over::Ask { text, .. } | Over::Tell(text) => text,
    };
    if let Some(step) = step(code) {
        text.scroll(step);
        return None;
    }
    match (state.over.take()?, code) {
        (Over::Ask { then, .. }, KeyCode::Char('y' | 'Y')) => Some(then),
        (Over::Ask { .. }, KeyCode::Char('n' | 'N' | 'q') | KeyCode::Esc) => None,
        (Over::Tell(_), KeyCode::Char('q') | KeyCode::Esc | KeyCode::Enter) => None,
        (still, _) => {
            state.over = Some(still);
            None
        }
    }
}

fn typed(state: &mut State, code: KeyCode) {
    let filter = match &mut state.place {
        Place::Services => &mut state.filter,
        Place::Processes(processes) => &mut processes.filter,
        Place::Events(_) => return,
    };
    match code {
        KeyCode::Char(letter) => filter.push(letter),
        KeyCode::Backspace => drop(filter.pop()),
        KeyCode::Enter => state.typing = false,
        KeyCode::Esc => {
            filter.clear();
            state.typing = false;
        }
        _ => {
            if let Some(step) = step(code) {
                go(state, step);
            }
        }
    }
}

fn go(state: &mut State, step: Step) {
    match &mut state.place {
        Place::Services => {
            let shown: Vec<_> = state.shown().iter().map(|service| service.info.id).collect();
            state.services.step(step, &shown);
        }
        Place::Processes(processes) => {
            let Ok(sample) = &state.snapshot else {
                return;
            };
            if let Some(tree) = &sample.tree {
                let keys = Processes::keys(tree, &processes.shown(tree));
                processes.cursor.step(step, &keys);
            }
        }
        Place::Events(events) => events.scroll(step),
    }
}

fn enter(state: &mut State) {
    if let (Place::Services, Some(service)) = (&state.place, state.meant()) {
        state.place = Place::Processes(Box::new(Processes::new(service)));
    }
}

fn back(state: &mut State) -> Option<Action> {
    match std::mem::replace(&mut state.place, Place::Services) {
        Place::Services => state.filter.clear(),
        Place::Processes(mut processes) if !processes.filter.is_empty() => {
            processes.filter.clear();
            state.place = Place::Processes(processes);
        }
        Place::Processes(_) => {}
        Place::Events(events) => {
            state.place = events.back;
            return Some(Action::Unfollow);
        }
    }
    None
}

fn quit(state: &mut State) -> Option<Action> {
    let Some((what, _)) = &state.busy else {
        return Some(Action::Quit);
    };
    state.over = Some(Over::Ask {
        text: Text {
            title: "Quit now?".to_owned(),
            head: vec![
                format!("{what}: that is not finished, and would be left half done."),
                "y: quit    n: stay".to_owned(),
            ],
            ..Text::default()
        },
        then: Action::Quit,
    });
    None
}

/// Whether something else is to be done first.
fn is_busy(state: &mut State) -> bool {
    if let Some((what, _)) = &state.busy {
        state.message = Some(format!("first this: {what}"));
    }
    state.busy.is_some()
}

fn preview(state: &mut State) -> Option<Action> {
    if is_busy(state) {
        return None;
    }
    let info = state.meant()?.info.clone();
    Some(Action::Preview(info))
}

fn release(state: &mut State) {
    if is_busy(state) {
        return;
    }
    let Some((processes, tree)) = state.tree() else {
        state.message = Some("choose a process: Enter shows those of a service".to_owned());
        return;
    };
    let chosen = |member: &&zinit_tracker::Member| Some(member.key) == processes.cursor.chosen();
    let Some(member) = tree.members.iter().find(chosen) else {
        return;
    };
    let below = descendants(tree, member.key);
    let head = vec![
        format!(
            "{} {} and its {} leave {}:",
            member.pid,
            output::plain(&member.comm),
            output::counted(below, "descendant", "descendants"),
            output::plain(&processes.name)
        ),
        "they run on, and a stop of the service leaves them alone.".to_owned(),
        "Afterwards a stop cannot tell its strays from them by certain signs.".to_owned(),
        "y: release    n: keep".to_owned(),
    ];
    let then = Action::Release(member.clone());
    state.over = Some(Over::Ask {
        text: Text {
            title: "Release?".to_owned(),
            head,
            ..Text::default()
        },
        then,
    });
}

/// How many living processes stand below this one.
fn descendants(tree: &super::sample::Tree, key: zinit_tracker::process::ProcessKey) -> usize {
    let Some(at) = tree.rows.iter().position(|row| tree.members[row.member].key == key) else {
        return 0;
    };
    let depth = tree.rows[at].depth;
    tree.rows[at + 1..].iter().take_while(|row| row.depth > depth).count()
}

fn follow(state: &mut State) -> Option<Action> {
    let name = state.meant()?.name();
    let back = std::mem::replace(&mut state.place, Place::Services);
    state.place = Place::Events(Box::new(Events {
        name: name.clone(),
        lines: std::collections::VecDeque::new(),
        below: 0,
        height: 1,
        back,
    }));
    Some(Action::Follow(name))
}

impl Events {
    fn scroll(&mut self, step: Step) {
        let most = self.lines.len().saturating_sub(self.height);
        let page = self.height.saturating_sub(1).max(1);
        let below = match step {
            Step::Up => self.below + 1,
            Step::Down => self.below.saturating_sub(1),
            Step::PageUp => self.below + page,
            Step::PageDown => self.below.saturating_sub(page),
            Step::Home => most,
            Step::End => 0,
        };
        self.below = below.min(most);
    }
}

impl Text {
    /// The lines that are seen, of so many.
    pub(super) fn window(&mut self, height: usize, count: usize) -> Range<usize> {
        (self.height, self.count) = (height, count);
        self.top = self.top.min(count.saturating_sub(height));
        self.top..count.min(self.top + height)
    }

    fn scroll(&mut self, step: Step) {
        let most = self.count.saturating_sub(self.height);
        let page = self.height.saturating_sub(1).max(1);
        let top = match step {
            Step::Up => self.top.saturating_sub(1),
            Step::Down => self.top + 1,
            Step::PageUp => self.top.saturating_sub(page),
            Step::PageDown => self.top + page,
            Step::Home => 0,
            Step::End => most,
        };
        self.top = top.min(most);
    }
}
