//! The children that this process had before it began to track, and what descends from them: nobody's members.
//!
//! A process keeps its children over execve(2), so the usual entry point of a container, `helper & exec zinit-tracker run …`, has
//! some that it did not create. Knows them and follows their descendants; what that means for signs, orphans and proof is
//! for [`signs`](super::signs) and [`scan`](super::scan) to say.

use std::collections::{HashMap, HashSet};

use crate::process::{ProcessKey, table::Row};

/// They are others', and so may orphans be.
#[derive(Debug, Default)]
pub(super) struct Bystanders {
    known: HashMap<ProcessKey, Bystander>,
    /// Orphans of others are given to this process, whatever it does: it is pid 1 or was a subreaper before.
    receives: bool,
    /// Some lived when tracking began. Who was orphaned by them between two looks cannot be told from an orphan of a service, also
    /// after they have ended.
    had_any: bool,
}

#[derive(Clone, Copy, Debug)]
struct Bystander {
    /// It was a child of this process when tracking began.
    is_own: bool,
    dead: bool,
}

impl Bystanders {
    /// Those in the table, which was read when this process was a subreaper already.
    pub(super) fn of(rows: &[Row], me: u32, receives: bool) -> Self {
        let mut bystanders = Self {
            receives,
            ..Self::default()
        };
        let own = rows.iter().filter(|row| row.parent == me);
        let own = own.map(|row| {
            let dead = row.dead;
            (row.key, Bystander { is_own: true, dead })
        });
        bystanders.known.extend(own);
        bystanders.follow(rows, |_| false);
        bystanders.had_any = bystanders.any_lives();
        bystanders
    }

    /// Follows them from one look to the next: takes in the children that they have now, and forgets those that are gone.
    pub(super) fn follow(&mut self, rows: &[Row], is_member: impl Fn(ProcessKey) -> bool) {
        if self.known.is_empty() {
            return;
        }
        let present: HashMap<u32, &Row> = rows.iter().map(|row| (row.key.tgid, row)).collect();
        // One that is missing may have been there when its child was read.
        let has_its_pid = |key: &&ProcessKey| present.get(&key.tgid).is_none_or(|row| row.key == **key);
        let mut pids: HashSet<u32> = self.known.keys().filter(has_its_pid).map(|key| key.tgid).collect();
        loop {
            let is_new =
                |row: &&Row| pids.contains(&row.parent) && !pids.contains(&row.key.tgid) && !is_member(row.key);
            let found: Vec<_> = rows.iter().filter(is_new).map(|row| row.key).collect();
            if found.is_empty() {
                break;
            }
            pids.extend(found.iter().map(|key| key.tgid));
            let descendant = Bystander {
                is_own: false,
                dead: false,
            };
            self.known.extend(found.into_iter().map(|key| (key, descendant)));
        }
        self.known.retain(|key, bystander| {
            let row = present.get(&key.tgid).filter(|row| row.key == *key);
            bystander.dead = row.is_none_or(|row| row.dead);
            row.is_some()
        });
    }

    /// Whether it is one of them.
    pub(super) fn contains(&self, key: ProcessKey) -> bool {
        self.known.contains_key(&key)
    }

    /// It was taken into a service on purpose.
    pub(super) fn forget(&mut self, key: ProcessKey) {
        self.known.remove(&key);
    }

    /// Whether one of them lived at the last look.
    pub(super) fn any_lives(&self) -> bool {
        self.known.values().any(|bystander| !bystander.dead)
    }

    /// Whether an orphan that this process is given may be somebody else's than its services'.
    pub(super) fn may_have_orphans(&self) -> bool {
        self.receives || self.had_any
    }

    /// Whether what children this process has proves nothing about its services.
    pub(super) fn blur_children(&self) -> bool {
        self.receives || self.any_lives()
    }

    /// Whether a dead child is for somebody else in this process to reap: one that was there before always, and an orphan unless
    /// it is given to this process only because that tracks.
    pub(super) fn are_reaped_by_others(&self, key: ProcessKey, sole_parent: bool) -> bool {
        let known = self.known.get(&key);
        known.is_some_and(|bystander| bystander.is_own || (self.receives && !sole_parent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tgid: u32, parent: u32) -> Row {
        Row {
            key: ProcessKey {
                tgid,
                start_boottime_ns: 1,
            },
            parent,
            session: 0,
            group: 0,
            dead: false,
            kernel_thread: false,
            threads: 1,
            status: 0,
            comm: String::new(),
        }
    }

    #[test]
    fn children_that_were_there_before_and_their_descendants_are_bystanders() {
        let mut rows = vec![row(10, 1), row(14, 12), row(12, 11), row(11, 10), row(20, 1)];
        let mut bystanders = Bystanders::of(&rows, 10, false);
        let is = |bystanders: &Bystanders, pid| bystanders.contains(row(pid, 0).key);
        assert!([11, 12, 14].iter().all(|pid| is(&bystanders, *pid)));
        assert!(!is(&bystanders, 10) && !is(&bystanders, 20));
        // 11 and 12 end; 14, an orphan by now, has a child; 15 is a child of this process.
        rows = vec![row(10, 1), row(14, 10), row(16, 14), row(15, 10)];
        bystanders.follow(&rows, |_| false);
        assert!(is(&bystanders, 14) && is(&bystanders, 16));
        assert!(!is(&bystanders, 11) && !is(&bystanders, 15));
        assert!(bystanders.blur_children());
        bystanders.follow(&[row(10, 1), row(15, 10)], |_| false);
        assert!(!bystanders.blur_children() && bystanders.may_have_orphans());
    }

    #[test]
    fn a_dead_child_has_no_orphans_to_give_but_is_not_to_be_reaped() {
        let mut dead = row(11, 10);
        dead.dead = true;
        let bystanders = Bystanders::of(&[row(10, 1), dead.clone()], 10, false);
        assert!(!bystanders.may_have_orphans() && !bystanders.blur_children());
        assert!(bystanders.are_reaped_by_others(dead.key, true));
        assert!(Bystanders::of(&[row(10, 1)], 10, true).may_have_orphans());
    }
}
