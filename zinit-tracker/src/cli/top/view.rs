//! Drawing: what is in the state, on as much room as there is.

use ratatui::{
    Frame,
    layout::{Constraint, Flex, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Cell, Clear, Paragraph, Row, Table, Wrap},
};
use zinit_tracker::{Tracking, process::ProcessKey, stop::Doubt, tracker::Departure};

use super::{
    keys,
    sample::{Load, Sample, ServiceSample},
    state::{Events, Over, Place, ProcessOrder, Processes, ServiceOrder, State, Text},
};
use crate::cli::{escapes, output, ps, tree};

/// Less is of no use.
const LEAST: (u16, u16) = (60, 12);
/// How wide the columns of processes are that stand before the command, with gaps.
const BEFORE_COMMAND: u16 = 56;
/// How much room the command name has at least, the number of generations included that are left out.
const COMMAND: u16 = 14;

/// How things look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    pub(super) colours: bool,
}

impl Look {
    fn coloured(self, colour: Color) -> Style {
        match self.colours {
            true => Style::new().fg(colour),
            false => Style::new(),
        }
    }

    fn bar() -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    fn bold() -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }
}

/// Draws everything. Returns the processes that are seen.
pub(super) fn draw(frame: &mut Frame<'_>, state: &mut State, look: Look) -> Vec<ProcessKey> {
    let area = frame.area();
    if area.width < LEAST.0 || area.height < LEAST.1 {
        let text = format!(
            "The terminal has {}x{}, and this needs {}x{}. q quits.",
            area.width, area.height, LEAST.0, LEAST.1
        );
        frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), area);
        return Vec::new();
    }
    let [head, body, detail, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(3),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(Line::from(title(state)).style(Look::bar()), head);
    let mut place = std::mem::replace(&mut state.place, Place::Services);
    let mut visible = Vec::new();
    match (&mut place, &state.snapshot) {
        // What has happened is true without books, too.
        (Place::Events(events), _) => draw_events(frame, events, body.union(detail)),
        (_, Err(why)) => {
            let text = Paragraph::new(output::plain(why)).wrap(Wrap { trim: true });
            frame.render_widget(text, body);
        }
        (Place::Services, Ok(_)) => draw_services(frame, state, look, body, detail),
        (Place::Processes(processes), Ok(sample)) => {
            visible = draw_processes(frame, processes, sample, look, body, detail);
        }
    }
    state.place = place;
    frame.render_widget(footer(state, look), foot);
    if let Some(over) = &mut state.over {
        draw_over(frame, over, area);
    }
    visible
}

fn title(state: &State) -> String {
    let Ok(sample) = &state.snapshot else {
        return " zinit-tracker top".to_owned();
    };
    let level = match sample.tracking {
        Tracking::Ebpf => "level ebpf",
        Tracking::Procfs => "level procfs: processes can be missed",
    };
    match &state.place {
        Place::Services => {
            let live = sample.services.iter().map(|service| service.info.live).sum::<u64>();
            let services = output::counted(sample.services.len(), "service", "services");
            format!(" zinit-tracker top   {level}   {services}, {live} live")
        }
        Place::Events(events) => format!(" {}   events from now on", output::plain(&events.name)),
        Place::Processes(processes) => {
            let info = state.meant().map(|service| &service.info);
            let live = info.map_or(0, |info| info.live);
            let escaped = match &processes.escapes {
                Some(escapes) => format!("{} escaped", escapes.len()),
                None => "looking for escapes …".to_owned(),
            };
            format!(
                " {}   {live} live   {escaped}   {level}",
                output::plain(&processes.name)
            )
        }
    }
}

fn draw_services(frame: &mut Frame<'_>, state: &mut State, look: Look, body: Rect, detail: Rect) {
    let ids: Vec<_> = state.shown().iter().map(|service| service.info.id).collect();
    // A line for the titles, and one for the total.
    let window = state.services.window(usize::from(body.height.saturating_sub(2)), &ids);
    let chosen = state.services.index();
    let shown = state.shown();
    let mut rows: Vec<_> = window
        .clone()
        .map(|index| {
            let row = service_row(shown[index], tracking(state), look);
            if index == chosen { row.style(Look::bar()) } else { row }
        })
        .collect();
    rows.push(total(&shown).style(Look::bold()));
    let widths = [
        Constraint::Min(16),
        Constraint::Length(7),
        Constraint::Length(8),
        Constraint::Length(7),
        Constraint::Length(10),
        Constraint::Length(6),
        Constraint::Percentage(26),
    ];
    let titles = [
        ("SERVICE", Some(ServiceOrder::Name)),
        ("LIVE", Some(ServiceOrder::Live)),
        ("FORKS/S", Some(ServiceOrder::Forks)),
        ("CPU %", Some(ServiceOrder::Cpu)),
        ("MEMORY", Some(ServiceOrder::Memory)),
        ("LEVEL", None),
        ("PROVABLE", Some(ServiceOrder::Proof)),
    ];
    let titles = titles.into_iter().enumerate().map(|(column, (name, order))| {
        let style = match order == Some(state.order) {
            true => Look::bold().add_modifier(Modifier::UNDERLINED),
            false => Look::bold(),
        };
        let text = Line::styled(name, style);
        Cell::new(if (1..5).contains(&column) {
            text.right_aligned()
        } else {
            text
        })
    });
    frame.render_widget(Table::new(rows, widths).header(Row::new(titles)), body);
    let age = state.snapshot.as_ref().map_or(String::new(), aged);
    let detailed = state.meant().map(|service| service_detail(service, &age));
    let lines = detailed.unwrap_or_default();
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: false }), detail);
}

fn tracking(state: &State) -> Option<Tracking> {
    state.snapshot.as_ref().ok().map(|sample| sample.tracking)
}

fn service_row(service: &ServiceSample, tracking: Option<Tracking>, look: Look) -> Row<'static> {
    let (proof, colour) = match &service.doubts[..] {
        [] => ("yes".to_owned(), Color::Green),
        doubts => {
            let reasons: Vec<_> = doubts.iter().map(Doubt::reason).collect();
            (format!("no: {}", reasons.join(", ")), Color::Yellow)
        }
    };
    let level = match tracking {
        Some(Tracking::Ebpf) => "ebpf",
        Some(Tracking::Procfs) => "procfs",
        None => "?",
    };
    Row::new([
        Cell::new(output::plain(&service.name())),
        right(service.info.live.to_string()),
        right(service.fork_rate.map_or("…".to_owned(), rate)),
        right(cpu(service.load)),
        right(memory(service.load.memory)),
        Cell::new(level),
        Cell::new(Span::styled(proof, look.coloured(colour))),
    ])
}

fn total(shown: &[&ServiceSample]) -> Row<'static> {
    let load = shown.iter().fold(Load::default(), |sum, service| Load {
        cpu: sum.cpu + service.load.cpu,
        memory: sum.memory + service.load.memory,
    });
    let forks = shown
        .iter()
        .filter_map(|service| service.fork_rate)
        .fold(0.0, |sum, rate| sum + rate);
    Row::new([
        Cell::new("TOTAL"),
        right(shown.iter().map(|service| service.info.live).sum::<u64>().to_string()),
        right(rate(forks)),
        right(cpu(load)),
        right(memory(load.memory)),
    ])
}

fn service_detail(service: &ServiceSample, age: &str) -> Vec<Line<'static>> {
    let info = &service.info;
    let state = info.state.name();
    let doubts: Vec<_> = service.doubts.iter().map(ToString::to_string).collect();
    let proof = match &doubts[..] {
        [] => "a stop can prove that nothing is left".to_owned(),
        doubts => format!("no stop can prove it: {}", doubts.join("; ")),
    };
    let name = output::plain(&service.name());
    vec![
        Line::from(format!(
            " {name}: {state}, {} ever, {} died, peak {}{age}",
            info.forks, info.exits, info.peak
        )),
        Line::from(format!(" {}", output::plain(&proof))),
    ]
}

fn draw_processes(
    frame: &mut Frame<'_>,
    processes: &mut Processes,
    sample: &Sample,
    look: Look,
    body: Rect,
    detail: Rect,
) -> Vec<ProcessKey> {
    let Some(tree) = sample.tree.as_ref().filter(|tree| tree.service == processes.service) else {
        frame.render_widget("reading its processes …", body);
        return Vec::new();
    };
    let shown = processes.shown(tree);
    let keys = Processes::keys(tree, &shown);
    let window = processes
        .cursor
        .window(usize::from(body.height.saturating_sub(1)), &keys);
    // Of a branch, each generation takes three columns.
    let most = usize::from(body.width.saturating_sub(BEFORE_COMMAND + COMMAND) / 3);
    let rows = window.clone().map(|index| {
        let row = &tree.rows[shown[index]];
        let member = &tree.members[row.member];
        let load = tree.loads.get(&member.key);
        let branches = match processes.is_tree() {
            true if row.depth > most => format!("…{} {}", row.depth, tree::branches(&tree.rows, row, 1)),
            true => tree::branches(&tree.rows, row, most),
            false => String::new(),
        };
        let gap = if branches.is_empty() { "" } else { " " };
        let left = processes.escape(member.key).map(|escape| names(&escape.left));
        let cells = [
            right(member.pid.to_string()),
            Cell::new(load.map_or("…".to_owned(), |(state, _)| state.to_string())),
            right(load.map_or("…".to_owned(), |(_, load)| cpu(*load))),
            right(load.map_or("…".to_owned(), |(_, load)| memory(load.memory))),
            right(ps::coarse(tree.at.saturating_sub(member.key.started()))),
            Cell::new(Span::styled(left.unwrap_or_default(), look.coloured(Color::Yellow))),
            Cell::new(format!("{branches}{gap}{}", output::plain(&member.comm))),
        ];
        let row = Row::new(cells);
        if index == processes.cursor.index() {
            row.style(Look::bar())
        } else {
            row
        }
    });
    let widths = [
        Constraint::Length(7),
        Constraint::Length(1),
        Constraint::Length(6),
        Constraint::Length(9),
        Constraint::Length(7),
        Constraint::Length(20),
        Constraint::Min(20),
    ];
    let titles = [
        ("PID", None),
        ("S", None),
        ("CPU %", Some(ProcessOrder::Cpu)),
        ("MEMORY", Some(ProcessOrder::Memory)),
        ("AGE", None),
        ("HAS LEFT", Some(ProcessOrder::Escapes)),
        ("COMMAND", Some(ProcessOrder::Tree)),
    ];
    let titles = titles.into_iter().map(|(name, order)| {
        let style = match order == Some(processes.order) {
            true => Look::bold().add_modifier(Modifier::UNDERLINED),
            false => Look::bold(),
        };
        let text = Line::styled(name, style);
        Cell::new(match name {
            "S" | "HAS LEFT" | "COMMAND" => text,
            _ => text.right_aligned(),
        })
    });
    frame.render_widget(Table::new(rows, widths).header(Row::new(titles)), body);
    let place = match keys.len() {
        0 => " nobody is shown".to_owned(),
        count => format!(" {} of {count}{}", processes.cursor.index() + 1, aged(sample)),
    };
    let escape = processes.cursor.chosen().and_then(|key| processes.escape(key));
    let why = escape.map_or(String::new(), |escape| {
        let left: Vec<_> = escape
            .left
            .iter()
            .map(|departure| format!("left {departure}"))
            .collect();
        let creator = escape.line.get(1).map(escapes::name_of);
        let creator = creator.map_or(String::new(), |creator| format!("; created by {creator}"));
        format!(" {}{creator}", output::plain(&left.join("; ")))
    });
    frame.render_widget(
        Paragraph::new(vec![Line::from(place), Line::from(why)]).wrap(Wrap { trim: false }),
        detail,
    );
    keys[window].to_vec()
}

/// What is said of figures that are not of everybody, or not of this moment.
fn aged(sample: &Sample) -> String {
    match (sample.unknown_loads, sample.loads_age.as_secs()) {
        (0, 0 | 1) => String::new(),
        (0, seconds) => format!("   (CPU and memory of the last {seconds} s)"),
        (unknown, _) => format!("   (CPU and memory without {unknown} that were not looked at yet)"),
    }
}

/// The kinds of what was left, each once.
fn names(left: &[Departure]) -> String {
    let mut names: Vec<_> = left.iter().map(Departure::name).collect();
    names.dedup();
    names.join(",")
}

fn draw_events(frame: &mut Frame<'_>, events: &mut Events, area: Rect) {
    events.height = usize::from(area.height);
    let end = events.lines.len().saturating_sub(events.below);
    let begin = end.saturating_sub(events.height);
    // At the top of what is kept, the room is filled from there on.
    let end = (begin + events.height).min(events.lines.len());
    let lines: Vec<_> = events
        .lines
        .range(begin..end)
        .map(|line| Line::from(line.as_str()))
        .collect();
    let text = match lines.is_empty() {
        true => Paragraph::new("nothing has happened yet"),
        false => Paragraph::new(lines),
    };
    frame.render_widget(text, area);
}

fn footer(state: &State, look: Look) -> Line<'static> {
    let filter = match &state.place {
        Place::Services => &state.filter,
        Place::Processes(processes) => &processes.filter,
        Place::Events(_) => "",
    };
    let filter = output::plain(filter);
    if state.typing {
        return Line::from(format!(" /{filter}_   Enter: keep it   Esc: show all")).style(Look::bold());
    }
    if let Some(message) = &state.message {
        return Line::styled(format!(" {}", output::plain(message)), look.coloured(Color::Yellow));
    }
    let mut spans = Vec::new();
    if let Some((what, since)) = &state.busy {
        let text = format!(" {} … {} s ", output::plain(what), since.elapsed().as_secs());
        spans.push(Span::styled(text, look.coloured(Color::Yellow)));
    }
    if !filter.is_empty() {
        spans.push(Span::styled(format!(" only {filter:?} "), look.coloured(Color::Yellow)));
    }
    spans.push(Span::raw(match state.place {
        Place::Services => " Enter processes  s stop  e events  / filter  o order  ? help  q quit",
        Place::Processes(_) => " Esc back  s stop  r release  e events  / filter  o order  ? help  q quit",
        Place::Events(_) => " Esc back  ? help  q quit",
    }));
    Line::from(spans)
}

fn draw_over(frame: &mut Frame<'_>, over: &mut Over, area: Rect) {
    match over {
        Over::Help => {
            let lines: Vec<_> = keys::HELP
                .iter()
                .map(|(keys, what)| Line::from(format!("{keys:<24}{what}")))
                .collect();
            let mut text = Text {
                title: "Keys".to_owned(),
                lines: lines.iter().map(ToString::to_string).collect(),
                ..Text::default()
            };
            draw_text(frame, &mut text, area);
        }
        Over::Ask { text, .. } | Over::Tell(text) => draw_text(frame, text, area),
    }
}

fn draw_text(frame: &mut Frame<'_>, text: &mut Text, area: Rect) {
    let longest = text
        .head
        .iter()
        .chain(&text.lines)
        .map(|line| line.chars().count())
        .max();
    let longest = longest.unwrap_or(0).max(text.title.chars().count() + 2);
    let width = u16::try_from(longest + 2)
        .unwrap_or(u16::MAX)
        .clamp(30, area.width.saturating_sub(4));
    let folded = |lines: &[String]| -> Vec<String> {
        let fold = |line: &String| fold(line, usize::from(width.saturating_sub(2)));
        lines.iter().flat_map(fold).collect()
    };
    let (head, lines) = (folded(&text.head), folded(&text.lines));
    let head_height = u16::try_from(head.len()).unwrap_or(u16::MAX);
    let wanted = u16::try_from(lines.len())
        .unwrap_or(u16::MAX)
        .saturating_add(head_height);
    let height = wanted.saturating_add(2).clamp(3, area.height.saturating_sub(2));
    let [area] = Layout::horizontal([Constraint::Length(width)])
        .flex(Flex::Center)
        .areas(area);
    let [area] = Layout::vertical([Constraint::Length(height)])
        .flex(Flex::Center)
        .areas(area);
    frame.render_widget(Clear, area);
    let block = Block::bordered().title(format!(" {} ", text.title));
    let [head_area, body] =
        Layout::vertical([Constraint::Length(head_height), Constraint::Min(0)]).areas(block.inner(area));
    let seen = text.window(usize::from(body.height), lines.len());
    let block = match seen.len() < lines.len() {
        true => block.title_bottom(format!(" {}-{} of {} ", seen.start + 1, seen.end, lines.len())),
        false => block,
    };
    frame.render_widget(block, area);
    frame.render_widget(Paragraph::new(head.join("\n")), head_area);
    frame.render_widget(Paragraph::new(lines[seen].join("\n")), body);
}

/// A line as several that are no longer than that, cut between words where there are any.
fn fold(line: &str, width: usize) -> Vec<String> {
    const INDENT: &str = "    ";
    let mut folded = Vec::new();
    let mut rest: Vec<char> = line.chars().collect();
    while rest.len() > width && width > 2 * INDENT.len() {
        let space = rest[..width].iter().rposition(|letter| *letter == ' ');
        let cut = space.filter(|at| *at > width / 2).map_or(width, |at| at + 1);
        let below = rest.split_off(cut);
        folded.push(rest.iter().collect::<String>().trim_end().to_owned());
        rest = INDENT.chars().chain(below).collect();
    }
    folded.push(rest.into_iter().collect());
    folded
}

fn right(text: String) -> Cell<'static> {
    Cell::new(Line::from(text).right_aligned())
}

fn rate(per_second: f64) -> String {
    match per_second {
        large if large >= 1000.0 => format!("{large:.0}"),
        small => format!("{small:.1}"),
    }
}

fn cpu(load: Load) -> String {
    format!("{:.1}", load.cpu)
}

fn memory(bytes: u64) -> String {
    const MIB: f64 = 1_048_576.0;
    match bytes as f64 / MIB {
        large if large >= 10_000.0 => format!("{:.1} GiB", large / 1024.0),
        small => format!("{small:.1} MiB"),
    }
}

#[cfg(test)]
mod tests;
