//! The last build with the layout before this one, as it was: its object loads, pins and counts what it did then.
//!
//! `tests/layouts/1.o` is that build's committed object (2026-11-26).

#![allow(clippy::unwrap_used, reason = "what fails here fails a test")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{
    Btf, Ebpf, EbpfLoader, RawTracePointRunOptions, TestRun as _,
    maps::{Array, HashMap, MapData},
    programs::{BtfTracePoint, Iter, RawTracePoint, links::FdLink},
};
use rustix::fs::{FlockOperation, flock};
use tokio::process::{Child, Command};
use zinit_tracker::{
    Config,
    records::{EARLIER_LAYOUT_VERSION, Exit, ExitKey, INSTANCE_LEN, Layout, NAME_LEN, Process, Service},
};

const OBJECT: &[u8] = aya::include_bytes_aligned!("../layouts/1.o");
const MAPS: [&str; 9] = [
    "processes",
    "services",
    "spawns",
    "adoptions",
    "exits",
    "events",
    "stats",
    "control",
    "layout",
];
const HOOKS: [(&str, &str); 5] = [
    ("zinit_free", "sched_process_free"),
    ("zinit_exit", "sched_process_exit"),
    ("zinit_exec", "sched_process_exec"),
    ("zinit_wakeup", "sched_wakeup_new"),
    ("zinit_fork", "sched_process_fork"),
];

/// Books of that build, which this process uses.
#[derive(Debug)]
pub struct Earlier {
    ebpf: Ebpf,
    directory: PathBuf,
    in_use: File,
    services: u32,
}

impl Earlier {
    /// Loads and pins them for so many processes, as that build did.
    ///
    /// # Panics
    ///
    /// When the kernel refuses it.
    #[must_use]
    pub fn load(pins: &Path, max_processes: u32) -> Self {
        let offsets = zinit_tracker::kernel_offsets().expect("the kernel has the structures");
        let has_wakeup = offsets.contains(&("HAS_TASK_BTF", 1));
        let btf = Btf::from_sys_fs().expect("the kernel has BTF");
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&btf)).map_max_entries("processes", max_processes);
        for (name, offset) in &offsets {
            loader.override_global(name, offset, false);
        }
        let mut ebpf = loader.load(OBJECT).expect("the object loads");
        let directory = pins.join(format!("v{EARLIER_LAYOUT_VERSION}"));
        for path in [pins.to_owned(), directory.join("links"), directory.join("programs")] {
            fs::create_dir_all(path).expect("a directory can be made");
        }
        for name in MAPS {
            let map = ebpf.map(name).expect("it has this map");
            map.pin(directory.join(name)).expect("a map can be pinned");
        }
        let program = |name: &str| directory.join("programs").join(name);
        for name in ["zinit_spawn", "zinit_state", "zinit_release"] {
            let command: &mut RawTracePoint = ebpf.program_mut(name).unwrap().try_into().unwrap();
            command.load().unwrap();
            command.pin(program(name)).unwrap();
        }
        for name in ["zinit_tasks", "zinit_adopt"] {
            let iterator: &mut Iter = ebpf.program_mut(name).unwrap().try_into().unwrap();
            iterator.load("task", &btf).unwrap();
            iterator.pin(program(name)).unwrap();
        }
        for (name, tracepoint) in HOOKS {
            if name == "zinit_wakeup" && !has_wakeup {
                continue;
            }
            let hook: &mut BtfTracePoint = ebpf.program_mut(name).unwrap().try_into().unwrap();
            hook.load(tracepoint, &btf).unwrap();
            hook.pin(program(name)).unwrap();
            let id = hook.attach().unwrap();
            let link = FdLink::from(hook.take_link(id).unwrap());
            link.pin(directory.join("links").join(name)).unwrap();
        }
        let in_use = File::open(&directory).unwrap();
        flock(&in_use, FlockOperation::LockShared).unwrap();
        let mut earlier = Self {
            ebpf,
            directory,
            in_use,
            services: 0,
        };
        earlier.write_layout(max_processes);
        earlier
    }

    fn write_layout(&mut self, max_processes: u32) {
        let layout = Layout {
            version: EARLIER_LAYOUT_VERSION,
            next_service: self.services + 1,
            max_processes,
            ..Layout::default()
        };
        let map = self.ebpf.map_mut("layout").unwrap();
        Array::<_, Layout>::try_from(map).unwrap().set(0, layout, 0).unwrap();
    }

    /// Where they are pinned.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Ends this process's use of them; the pins stay.
    pub fn leave(self) {
        drop(self.in_use);
    }

    /// Registers a service of the tool's, and returns its id.
    ///
    /// # Panics
    ///
    /// When the map cannot be written.
    pub fn register(&mut self, name: &str) -> u32 {
        self.services += 1;
        let mut layouts = Array::<_, Layout>::try_from(self.ebpf.map_mut("layout").unwrap()).unwrap();
        let layout = layouts.get(&0, 0).unwrap();
        let next_service = self.services + 1;
        layouts.set(0, Layout { next_service, ..layout }, 0).unwrap();
        let service = Service {
            live: 0,
            forks: 0,
            exits: 0,
            peak: 0,
            lost: 0,
            missed_before: 0,
            registered_boottime_ns: u64::try_from(zinit_tracker::Tracker::now().as_nanos()).unwrap(),
            adopting_boottime_ns: 0,
            registrant_start_boottime_ns: 0,
            root_start_boottime_ns: 0,
            root_tgid: 0,
            registrant_tgid: std::process::id(),
            state: 0,
            parent: 0,
            flags: 0,
            pid_namespace: u32::try_from(fs::metadata("/proc/self/ns/pid").unwrap().ino()).unwrap(),
            pid_namespace_level: 0,
            _pad: 0,
            instance: padded::<INSTANCE_LEN>(&Config::default().instance),
            name: padded::<NAME_LEN>(name),
        };
        let map = self.ebpf.map_mut("services").unwrap();
        let mut services = HashMap::<_, u32, Service>::try_from(map).unwrap();
        services.insert(self.services, service, 0).unwrap();
        self.services
    }

    /// Starts a command in a service. As the caller does: in its own thread.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    pub fn spawn(&self, service: u32, command: &mut Command) -> Child {
        let request: &RawTracePoint = self.ebpf.program("zinit_spawn").unwrap().try_into().unwrap();
        let run = |service: u32| {
            let mut options = RawTracePointRunOptions::new();
            options.args[0] = service.into();
            request.test_run(options).unwrap().return_value
        };
        assert_eq!(run(service), 0);
        let child = command.spawn().expect("the command can be executed");
        assert_eq!(run(0), 0, "the process was not counted");
        child
    }

    /// Lets a member go.
    ///
    /// # Panics
    ///
    /// When it is none.
    pub fn release(&self, tgid: u32) {
        let start = self.members()[&tgid].start_boottime_ns;
        let release: &RawTracePoint = self.ebpf.program("zinit_release").unwrap().try_into().unwrap();
        let mut options = RawTracePointRunOptions::new();
        options.args[..2].copy_from_slice(&[tgid.into(), start]);
        assert_eq!(release.test_run(options).unwrap().return_value, 1);
    }

    /// Its members, by tgid.
    #[must_use]
    pub fn members(&self) -> BTreeMap<u32, Process> {
        entries(&self.directory.join("processes"))
    }

    /// What it has recorded of exits.
    #[must_use]
    pub fn exits(&self) -> Vec<(ExitKey, Exit)> {
        let map = self.ebpf.map("exits").unwrap();
        let exits = HashMap::<_, ExitKey, Exit>::try_from(map).unwrap();
        exits.iter().collect::<Result<_, _>>().unwrap()
    }

    /// The service with this id.
    #[must_use]
    pub fn service(&self, id: u32) -> Service {
        let map = self.ebpf.map("services").unwrap();
        HashMap::<_, u32, Service>::try_from(map).unwrap().get(&id, 0).unwrap()
    }
}

/// The members in a pinned map, by tgid.
///
/// # Panics
///
/// When it is no such map.
#[must_use]
pub fn entries(path: &Path) -> BTreeMap<u32, Process> {
    let map = aya::maps::Map::HashMap(MapData::from_pin(path).unwrap());
    let processes = HashMap::<_, u32, Process>::try_from(map).unwrap();
    processes.iter().collect::<Result<_, _>>().unwrap()
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}
