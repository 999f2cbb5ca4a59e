//! The hooks: programs that stay attached for as long as the tracker is loaded.
//!
//! Attaches them, says which have come loose, and attaches those again. What that means for services is not decided here.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    programs::{
        BtfTracePoint, Iter,
        links::{FdLink, PinnedLink},
    },
};
use zinit_ebpf::{TEXT_FILE, program};

use super::{
    books::{BooksError, OpenError, failed},
    load,
    pins::PinDirectory,
    runs::ProgramRuns,
};

/// Programs that are attached for as long as the tracker is loaded, each with its tracepoint.
pub(super) const HOOKS: [(&str, &str); 5] = [
    // Deaths first: nothing may join that could not leave.
    (program::FREE, "sched_process_free"),
    (program::EXIT, "sched_process_exit"),
    (program::EXEC, "sched_process_exec"),
    (program::WAKEUP_NEW, "sched_wakeup_new"),
    (program::FORK, "sched_process_fork"),
];

/// How long the kernel may take to detach a program whose link is gone.
const DETACHING: Duration = Duration::from_secs(10);

struct Hook {
    name: &'static str,
    program: BtfTracePoint,
    id: u32,
    /// The kernel's digest of the instructions.
    tag: u64,
    /// The maps that it works on.
    maps: Vec<u32>,
}

/// The hooks that are loaded.
pub(super) struct Hooks {
    hooks: Vec<Hook>,
    /// What the build that they are of was built from.
    pub(super) sources: [u8; 32],
}

impl Hooks {
    /// Opens those that are pinned; which they are was decided when they were loaded.
    pub(super) fn pinned(pins: &PinDirectory, sources: [u8; 32]) -> Result<Self, BooksError> {
        let mut hooks = Vec::with_capacity(HOOKS.len());
        for (name, _) in HOOKS {
            let path = pins.program(name);
            if !path.exists() {
                continue;
            }
            let program = BtfTracePoint::from_pin(path).map_err(failed("open a pinned program"))?;
            let info = program.info().map_err(failed("inspect a program"))?;
            let maps = info.map_ids().map_err(failed("inspect a program"))?;
            hooks.push(Hook {
                name,
                program,
                id: info.id(),
                tag: info.tag(),
                maps: maps.unwrap_or_default(),
            });
        }
        Ok(Self { hooks, sources })
    }

    /// Opens them anew: another build may have replaced them, and then this one the others. What has other instructions, or has no map in
    /// common with them, is not taken for them.
    pub(super) fn refresh(&mut self, pins: &PinDirectory) -> Result<(), BooksError> {
        for found in Self::pinned(pins, self.sources)?.hooks {
            let same = |hook: &&mut Hook| {
                (hook.name, hook.tag) == (found.name, found.tag) && hook.maps.iter().any(|map| found.maps.contains(map))
            };
            if let Some(hook) = self.hooks.iter_mut().find(same) {
                *hook = found;
            }
        }
        Ok(())
    }

    /// Finishes or takes back what one left that died while it replaced programs: a link whose program is in its place belongs there
    /// too. The caller holds the books exclusively.
    pub(super) fn settle(pins: &PinDirectory) -> Result<(), OpenError> {
        for (name, _) in HOOKS {
            let path = pins.link(name);
            let successor = PinDirectory::successor(&path);
            if !successor.exists() {
                continue;
            }
            let place = BtfTracePoint::from_pin(pins.program(name)).and_then(|program| Ok(program.info()?.id()));
            let attached = PinnedLink::from_pin(&successor).and_then(|link| FdLink::from(link).info());
            if let (Ok(place), Ok(attached)) = (place, attached)
                && attached.program_id() == place
            {
                PinDirectory::succeed(&path)?;
            }
        }
        Ok(pins.remove_successors()?)
    }

    /// Hooks that are not attached as the loader did it: their link is gone, or is another program's.
    pub(super) fn loose(&self, pins: &PinDirectory) -> Vec<&'static str> {
        let loose = self.hooks.iter().filter(|hook| !hook.is_attached(pins));
        loose.map(|hook| hook.name).collect()
    }

    /// Attaches the loose hooks again, in the place of what is pinned there. Returns which. The caller holds the books
    /// exclusively.
    pub(super) fn mend(&mut self, pins: &PinDirectory) -> Result<Vec<&'static str>, OpenError> {
        pins.create_layout()?;
        let mut mended = Vec::new();
        for hook in self.hooks.iter_mut().filter(|hook| !hook.is_attached(pins)) {
            pins.remove_link(hook.name)?;
            attach_again(hook.name, &mut hook.program, &pins.link(hook.name))?;
            mended.push(hook.name);
        }
        Ok(mended)
    }

    /// How often each hook ran since it was loaded, and was skipped.
    pub(super) fn runs(&self) -> Result<Vec<ProgramRuns>, BooksError> {
        let runs = self
            .hooks
            .iter()
            .map(|hook| ProgramRuns::of(hook.name, hook.program.fd()));
        runs.collect()
    }
}

impl Hook {
    fn is_attached(&self, pins: &PinDirectory) -> bool {
        PinnedLink::from_pin(pins.link(self.name))
            .and_then(|link| FdLink::from(link).info())
            .is_ok_and(|link| link.program_id() == self.id)
    }
}

/// Attaches a hook whose link is gone or going: before 6.10 a tracepoint takes a program once, and the kernel detaches it a
/// grace period after its link was removed.
fn attach_again(name: &'static str, program: &mut BtfTracePoint, path: &Path) -> Result<(), OpenError> {
    let deadline = Instant::now() + DETACHING;
    loop {
        match attach(name, program, path) {
            Err(OpenError::Load(error)) if error.is_already_there() && Instant::now() < deadline => {
                thread::sleep(DETACHING / 1000);
            }
            result => return result,
        }
    }
}

/// Pins the programs, and attaches and pins the hooks: in their places, or as successors of what is there.
pub(super) fn pin(ebpf: &mut Ebpf, pins: &PinDirectory, place: fn(&Path) -> PathBuf) -> Result<(), OpenError> {
    for (name, program) in ebpf.programs_mut() {
        if program.fd().is_ok() {
            let path = place(&pins.program(name));
            program.pin(path).map_err(failed("pin a program"))?;
        }
    }
    for (name, _) in HOOKS {
        let hook: &mut BtfTracePoint = load::get(ebpf, name)?;
        if hook.fd().is_ok() {
            attach(name, hook, &place(&pins.link(name)))?;
        }
    }
    pin_text(ebpf, &place(&pins.map(TEXT_FILE)))
}

/// Pins what prints the members as a table, if it is loaded.
fn pin_text(ebpf: &mut Ebpf, path: &Path) -> Result<(), OpenError> {
    let text: &mut Iter = load::get(ebpf, program::TEXT)?;
    if text.fd().is_err() {
        return Ok(());
    }
    let link = text
        .attach()
        .and_then(|id| text.take_link(id))
        .map_err(|source| load::failed("attach", program::TEXT, source))?;
    let link = FdLink::try_from(link).map_err(failed("pin a link"))?;
    let _pinned: PinnedLink = link.pin(path).map_err(failed("pin a link"))?;
    Ok(())
}

/// Attaches a hook and pins its link.
fn attach(name: &'static str, program: &mut BtfTracePoint, path: &Path) -> Result<(), OpenError> {
    let link = program
        .attach()
        .and_then(|id| program.take_link(id))
        .map_err(|source| load::failed("attach", name, source))?;
    let _pinned: PinnedLink = FdLink::from(link).pin(path).map_err(failed("pin a link"))?;
    Ok(())
}
