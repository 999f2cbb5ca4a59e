//! Where one is in a list that changes meanwhile.

use std::ops::Range;

/// The chosen entry, by what it is rather than by where, and the part of the list that is seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cursor<K> {
    chosen: Option<K>,
    index: usize,
    offset: usize,
    /// How many entries are seen at a time.
    height: usize,
}

/// A way to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
}

impl<K> Default for Cursor<K> {
    fn default() -> Self {
        Self {
            chosen: None,
            index: 0,
            offset: 0,
            height: 1,
        }
    }
}

impl<K: Copy + PartialEq> Cursor<K> {
    pub(super) fn chosen(&self) -> Option<K> {
        self.chosen
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Finds the chosen entry again; if it has gone, what is in its place is chosen.
    pub(super) fn settle(&mut self, entries: &[K]) {
        let found = self
            .chosen
            .and_then(|chosen| entries.iter().position(|entry| *entry == chosen));
        self.choose(found.unwrap_or(self.index), entries);
    }

    pub(super) fn step(&mut self, step: Step, entries: &[K]) {
        self.settle(entries);
        let page = self.height.saturating_sub(1).max(1);
        let index = match step {
            Step::Up => self.index.saturating_sub(1),
            Step::Down => self.index + 1,
            Step::PageUp => self.index.saturating_sub(page),
            Step::PageDown => self.index + page,
            Step::Home => 0,
            Step::End => usize::MAX,
        };
        self.choose(index, entries);
    }

    /// The entries that are seen in so many lines.
    pub(super) fn window(&mut self, height: usize, entries: &[K]) -> Range<usize> {
        self.height = height.max(1);
        self.settle(entries);
        let last_offset = entries.len().saturating_sub(self.height);
        let lowest = (self.index + 1).saturating_sub(self.height);
        self.offset = self.offset.clamp(lowest, self.index.max(lowest)).min(last_offset);
        self.offset..entries.len().min(self.offset + self.height)
    }

    fn choose(&mut self, index: usize, entries: &[K]) {
        self.index = index.min(entries.len().saturating_sub(1));
        self.chosen = entries.get(self.index).copied();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(chosen: usize, count: usize) -> (Cursor<usize>, Vec<usize>) {
        let entries: Vec<_> = (0..count).collect();
        let mut cursor = Cursor::default();
        cursor.choose(chosen, &entries);
        (cursor, entries)
    }

    #[test]
    fn the_chosen_entry_stays_chosen_where_it_moves() {
        let (mut cursor, _) = at(3, 5);
        cursor.settle(&[9, 3, 8]);
        assert_eq!((cursor.chosen(), cursor.index()), (Some(3), 1));
        cursor.settle(&[9, 8]);
        assert_eq!(cursor.chosen(), Some(8));
        cursor.settle(&[]);
        assert_eq!(cursor.chosen(), None);
    }

    #[test]
    fn a_long_list_is_gone_through_by_pages_and_to_its_ends() {
        let (mut cursor, entries) = at(0, 5000);
        assert_eq!(cursor.window(20, &entries), 0..20);
        cursor.step(Step::PageDown, &entries);
        assert_eq!(cursor.chosen(), Some(19));
        cursor.step(Step::Down, &entries);
        assert_eq!(cursor.window(20, &entries), 1..21);
        cursor.step(Step::End, &entries);
        assert_eq!(cursor.window(20, &entries), 4980..5000);
        cursor.step(Step::Up, &entries);
        assert_eq!(cursor.window(20, &entries), 4980..5000);
        cursor.step(Step::PageUp, &entries);
        assert_eq!(cursor.chosen(), Some(4979));
        assert_eq!(cursor.window(20, &entries), 4979..4999);
        cursor.step(Step::Home, &entries);
        assert_eq!(cursor.window(20, &entries), 0..20);
    }

    #[test]
    fn a_list_that_shrinks_leaves_no_empty_lines() {
        let (mut cursor, entries) = at(4999, 5000);
        cursor.window(20, &entries);
        assert_eq!(cursor.window(20, &entries[..10]), 0..10);
        assert_eq!(cursor.window(20, &[]), 0..0);
    }
}
