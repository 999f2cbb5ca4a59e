//! Fuzzing: records of the books, which another root process may have written.

use zinit_ebpf::{COMM_LEN, Event, Exit, ExitKey, INSTANCE_LEN, NAME_LEN, Process, Service as Record, Stats, Task};

use super::{
    Ended, Member, ServiceInfo,
    lineage::{climb, known},
};
use crate::kernel::fuzzing::{Pod, event, stats, take, tasks};

/// Reads services, members and exit records, as many as the first three bytes say, and the rest as tasks, as an event and as
/// counters.
pub fn records(mut data: &[u8]) {
    let Some([services, members, ended]) = take::<[u8; 3]>(&mut data) else {
        return;
    };
    let services = entries(&mut data, services, |id: u32, record: Record| {
        ServiceInfo::new(id, &record)
    });
    let members = entries(&mut data, members, |tgid: u32, entry: Process| {
        Member::new(tgid, &entry)
    });
    let ended = entries(&mut data, ended, |key: ExitKey, exit: Exit| Ended::new(&key, &exit));
    for info in &services {
        check_text(&info.instance, INSTANCE_LEN);
        check_text(&info.name, NAME_LEN);
        assert!(info.cookie().ends_with(&info.registered.as_nanos().to_string()));
    }
    let known = known(&services, &members, &ended);
    let keys = members.iter().map(|member| member.key);
    for key in keys.chain(ended.iter().map(|ended| ended.key)) {
        let (line, creator) = climb(&known, key);
        assert_eq!(line.first().map(|link| link.key), Some(key));
        assert!(line.len() == known.len() || !known.contains_key(&creator));
        for link in line {
            check_text(&link.comm, COMM_LEN);
            assert!(link.fate.is_none_or(|fate| !fate.to_string().is_empty()));
        }
    }
    serde_json::to_string(&(services, members)).expect("records have no maps with keys other than text");
    assert_eq!(tasks(data).len(), data.len() / size_of::<Task>());
    assert_eq!(event(data).is_some(), data.len() == size_of::<Event>());
    let cpus: Vec<Stats> = std::iter::from_fn(|| take(&mut data)).collect();
    let sum = stats(&cpus);
    assert!(cpus.iter().all(|cpu| cpu.seen <= sum.seen && cpu.kills <= sum.kills));
}

fn entries<K: Pod, V: Pod, T>(data: &mut &[u8], count: u8, read: impl Fn(K, V) -> T) -> Vec<T> {
    (0..count).map_while(|_| Some(read(take(data)?, take(data)?))).collect()
}

fn check_text(text: &str, longest: usize) {
    assert!(text.chars().count() <= longest && !text.contains('\0'), "{text:?}");
}
