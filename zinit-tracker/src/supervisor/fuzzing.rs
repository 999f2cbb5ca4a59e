//! Fuzzing: what a supervisor has saved, and what the next one makes of it.

use std::time::Duration;

use super::{
    machine::{Dependencies, Input, Machine, Remains},
    state_files::{Header, Saved, service, supervisor, written},
};
use crate::stop::Fate;

/// As in the corpus.
const BOOT: &str = "this boot";

/// Reads the text as a service's file and as the supervisor's own; what is good must be the same when it is written and read
/// again, and a machine must get on with it.
pub fn state_file(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let header = Header::of_boot(BOOT.to_owned());
    if let Ok(Some(found)) = supervisor(text, BOOT) {
        let again = written(&header, None, found.ended).expect("a header can be written");
        let again = supervisor(&again, BOOT).expect("what was written can be read");
        assert_eq!(again.map(|found| found.ended), Some(found.ended));
    }
    if let Ok(Some(saved)) = service(text, BOOT) {
        let again = written(&header, Some(&saved), false).expect("a state can be written");
        assert_eq!(service(&again, BOOT), Ok(Some(saved.clone())));
        assert!(matches!(service(&again, "another boot"), Ok(None)));
        for remains in [
            Remains::Nothing,
            Remains::Entry,
            Remains::Main,
            Remains::Ended(None),
            Remains::Ended(Some(Fate::Exited(0))),
        ] {
            go_on(&saved, remains);
        }
    }
}

fn go_on(saved: &Saved, remains: Remains) {
    let now = Duration::from_secs(1);
    let (mut machine, _) = Machine::resume(&saved.definition, Some(saved.snapshot.clone()), remains, now);
    for input in [
        Input::Dependencies(Dependencies::Met),
        Input::Created,
        Input::Spawned,
        Input::TestPassed,
        Input::Ended(Some(Fate::Killed(9))),
        Input::Stopped,
        Input::TimerOver,
        Input::Created,
        Input::Spawned,
        Input::Ended(None),
        Input::Stopped,
        Input::Stop,
        Input::Stopped,
    ] {
        drop(machine.step(input, now));
        let snapshot = machine.snapshot();
        let text = serde_json::to_string(&snapshot).expect("a snapshot can be written");
        assert_eq!(serde_json::from_str(&text).ok(), Some(snapshot));
    }
}
