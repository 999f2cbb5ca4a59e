//! `zinit-tracker top`: a live view of services and their processes.
//!
//! [`sample`] reads, [`state`] is what is shown, [`keys`] changes it, [`view`] draws it, [`work`] has the threads, [`screen`] the
//! terminal. What is decided here is only who does what next.

mod keys;
mod list;
mod sample;
mod screen;
mod state;
mod view;
mod work;

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
    sync::{
        Weak,
        mpsc::{Receiver, sync_channel},
    },
    time::{Duration, Instant},
};

use clap::Args;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers};
use zinit_tracker::process::ProcessKey;

use self::{
    sample::{Sampler, Wanted},
    screen::Screen,
    state::{Action, Place, State},
    view::Look,
    work::{Follower, Message, Out, Sought, Worker},
};
use super::{Global, output, parse};

pub(super) use self::screen::Log;

/// Watch services and their processes, and act on them.
///
/// Of each service: its living processes, how many are created per second, what they use (CPU in per cent of one processor;
/// resident memory, in which shared pages count for each process), the tracking level, and whether a stop can prove that
/// nothing is left. Enter shows the processes of a service by who created whom, and who has left its session, group, parents,
/// cgroup or namespaces. `?` shows all keys. Nothing is signalled or released before it was shown and confirmed.
///
/// Of thousands of processes not each is looked at every time; the screen says how old CPU and memory may be. NO_COLOR is
/// respected.
#[derive(Args)]
#[command(after_help = "\
Examples:
  zinit-tracker top
  zinit-tracker top --interval 5s
  zinit-tracker ps --columns pid,cpu,memory,command --sort cpu    without a terminal

Exit status: 0, also after SIGTERM, SIGINT or SIGHUP; 1 if it is not run in a terminal, or failed.")]
pub(super) struct Options {
    /// How often the books are read
    #[arg(short = 'd', long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    interval: Duration,
}

/// More often than this, nothing could be read.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

fn interval(text: &str) -> Result<Duration, String> {
    match parse::duration(text)? {
        short if short < SHORTEST_INTERVAL => Err("it is shorter than 100ms".to_owned()),
        interval => Ok(interval),
    }
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    // At a level that has nothing to look at, or a terminal that shows nothing, the words are for stderr.
    let config = global.lasting_config()?;
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        anyhow::bail!("`top` needs a terminal: `ps`, `tree`, `escapes` and `metrics` print the same without one");
    }
    let (out, messages) = sync_channel(work::QUEUE);
    // Before the terminal is taken: a signal that comes in between must not leave it so.
    work::signals(&out)?;
    let screen = Screen::take()?;
    work::input(&out)?;
    let sampler = Sampler::new(config, options.interval);
    let mut top = Top {
        screen,
        state: State::new(),
        look: Look {
            colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        },
        wanted: Wanted::default(),
        sampler: work::sampler(&out, sampler, options.interval)?,
        scout: work::scout(&out, options.interval)?,
        follower: None,
        out,
    };
    let result = top.watch(&messages);
    top.end(messages);
    result.map(|()| ExitCode::SUCCESS)
}

struct Top {
    screen: Screen,
    state: State,
    look: Look,
    /// What the sampler was last told.
    wanted: Wanted,
    sampler: Worker<Wanted>,
    scout: Worker<Sought>,
    follower: Option<Follower>,
    out: Out,
}

impl Top {
    /// Draws whenever there is something new, until the user has enough.
    fn watch(&mut self, messages: &Receiver<Message>) -> anyhow::Result<()> {
        loop {
            self.draw()?;
            // This end has a sender too, so there is always somebody who may send.
            let Ok(first) = messages.recv() else {
                return Ok(());
            };
            for message in std::iter::once(first).chain(messages.try_iter().take(work::QUEUE)) {
                if self.take_in(message)? {
                    return Ok(());
                }
            }
        }
    }

    fn draw(&mut self) -> anyhow::Result<()> {
        let mut visible: Vec<ProcessKey> = Vec::new();
        let (state, look) = (&mut self.state, self.look);
        self.screen.draw(|frame| visible = view::draw(frame, state, look))?;
        let wanted = self.state.wanted(visible);
        if wanted != self.wanted {
            if wanted.service != self.wanted.service {
                self.seek(&wanted);
            }
            self.sampler.order(wanted.clone());
            self.wanted = wanted;
        }
        Ok(())
    }

    /// Tells the scout whose escapes are looked for.
    fn seek(&self, wanted: &Wanted) {
        let sought = match (&self.state.snapshot, self.state.meant()) {
            (Ok(sample), Some(service)) if wanted.service == Some(service.info.id) => {
                Some((Weak::clone(&sample.tracker), service.info.handle()))
            }
            _ => None,
        };
        self.scout.order(sought);
    }

    /// Returns whether this was the end.
    fn take_in(&mut self, message: Message) -> anyhow::Result<bool> {
        match message {
            Message::Input(Event::Key(key)) => {
                if is_redraw(key) {
                    self.screen.retake()?;
                }
                return match keys::press(&mut self.state, key) {
                    Some(action) => self.act(action),
                    None => Ok(false),
                };
            }
            Message::Input(_) => {}
            Message::Signal(libc::SIGTSTP) => self.screen.suspend()?,
            Message::Signal(libc::SIGCONT) => self.screen.retake()?,
            Message::Signal(_) => return Ok(true),
            Message::Sampled(snapshot) => self.state.sampled(snapshot),
            Message::Loads(loads) => self.state.looked_at(loads),
            Message::Escapes(service, found) => self.state.looked_for_escapes(service, found),
            Message::Previewed(info, members) => self.state.previewed(*info, members),
            Message::Stopped(report) => self.state.stopped(report.map(|report| *report)),
            Message::Released(members) => self.state.released(members),
            Message::Events(lines) => self.state.happened(lines),
            Message::NoEvents(why) => {
                if matches!(self.state.place, Place::Events(_)) {
                    self.state.happened(vec![output::plain(&why)]);
                }
            }
            Message::Failed(error) => return Err(error),
        }
        Ok(false)
    }

    /// Returns whether this was the end.
    fn act(&mut self, action: Action) -> anyhow::Result<bool> {
        let out = &self.out;
        let tracker = match &self.state.snapshot {
            Ok(sample) => Weak::clone(&sample.tracker),
            Err(_) => Weak::new(),
        };
        let busy = match action {
            Action::Quit => return Ok(true),
            Action::Suspend => {
                self.screen.suspend()?;
                return Ok(false);
            }
            Action::Follow(name) => {
                self.follower = Some(work::follow(out, tracker, name)?);
                return Ok(false);
            }
            Action::Unfollow => {
                if let Some(follower) = self.follower.take() {
                    follower.let_end();
                }
                return Ok(false);
            }
            Action::Preview(info) => {
                let what = format!("looking whom a stop of {} would signal", info.name);
                work::preview(out, tracker, info)?;
                what
            }
            Action::Stop(info) => {
                let what = format!("stopping {}", info.name);
                work::stop_service(out, tracker, info)?;
                what
            }
            Action::Release(member) => {
                let what = format!("releasing {}", member.pid);
                work::release(out, tracker, member)?;
                what
            }
        };
        self.state.busy = Some((output::plain(&busy), Instant::now()));
        Ok(false)
    }

    /// Gives the terminal back, and leaves the books as somebody who only looked.
    fn end(self, messages: Receiver<Message>) {
        drop(self.screen);
        // Whoever waits for room in the queue sees that nobody reads any more.
        drop(messages);
        if let Some(follower) = self.follower {
            follower.end();
        }
        self.scout.end();
        self.sampler.end();
        if let Some((what, _)) = self.state.busy {
            output::note(&format!("{what}: that was not finished"));
        }
    }
}

fn is_redraw(key: KeyEvent) -> bool {
    key.code == KeyCode::Char('l') && key.modifiers.contains(KeyModifiers::CONTROL)
}

/// An error and its causes on one line, without what commands a terminal.
fn told(error: &anyhow::Error) -> String {
    let causes: Vec<_> = error.chain().map(ToString::to_string).collect();
    output::plain(&causes.join(": "))
}
