//! Virtual time: what happens next, and when.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Nanoseconds of virtual time.
pub type Nanos = u64;

/// Nanoseconds of a millisecond.
pub const MILLISECOND: Nanos = 1_000_000;

/// What is to happen, in the order of time; at the same time, in the order in which it was said.
#[derive(Clone, Debug)]
pub struct Clock<T> {
    now: Nanos,
    said: u64,
    coming: BinaryHeap<Reverse<Coming<T>>>,
}

#[derive(Clone, Debug)]
struct Coming<T> {
    at: Nanos,
    said: u64,
    what: T,
}

impl<T> Coming<T> {
    const fn key(&self) -> (Nanos, u64) {
        (self.at, self.said)
    }
}

impl<T> PartialEq for Coming<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<T> Eq for Coming<T> {}

impl<T> PartialOrd for Coming<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Coming<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl<T> Default for Clock<T> {
    fn default() -> Self {
        Self { now: 0, said: 0, coming: BinaryHeap::new() }
    }
}

impl<T> Clock<T> {
    /// Now.
    #[must_use]
    pub const fn now(&self) -> Nanos {
        self.now
    }

    /// Something will happen at a time; a time that is past means now.
    pub fn at(&mut self, at: Nanos, what: T) {
        self.said += 1;
        self.coming.push(Reverse(Coming { at: at.max(self.now), said: self.said, what }));
    }

    /// What happens next; time moves on to it.
    pub fn advance(&mut self) -> Option<T> {
        let Reverse(next) = self.coming.pop()?;
        self.now = next.at;
        Some(next.what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_happen_in_order_and_ties_as_they_were_said() {
        let mut clock = Clock::default();
        for (at, what) in [(5, 'c'), (1, 'a'), (5, 'd'), (1, 'b')] {
            clock.at(at, what);
        }
        assert_eq!((clock.advance(), clock.now()), (Some('a'), 1));
        assert_eq!(clock.advance(), Some('b'));
        assert_eq!((clock.advance(), clock.now()), (Some('c'), 5));
        clock.at(2, 'e');
        assert_eq!((clock.advance(), clock.advance(), clock.now()), (Some('d'), Some('e'), 5), "the past is now");
        assert_eq!(clock.advance(), None);
    }
}
