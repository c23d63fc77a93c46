//! Who waits, and who is next: interactive requests before batch, each class in order of arrival, and nobody for ever.

use std::collections::BTreeSet;

use phalanx_proto::SeqId;

use crate::engine::Class;

/// A sequence's place among others: class, then arrival.
pub type Key = (Class, SeqId);

/// So many interactive requests may pass a waiting batch request before it is offered room first.
pub const PASSED_FIRST: u32 = 8;
/// After so many, nobody passes it any more until it has found room.
pub const PASSED_MAX: u32 = 64;

/// The sequences that wait for a rank.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    waiting: BTreeSet<Key>,
    /// Batch requests among them.
    batch: usize,
    /// Interactive requests that have passed the first batch request.
    passed: u32,
}

/// Who is offered room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The sequence.
    pub key: Key,
    /// Whether, if it does not fit, the other class may be asked.
    pub may_pass: bool,
    /// Whether it is a batch request that has been passed often enough.
    pub its_turn: bool,
}

impl Queue {
    /// A sequence waits. One that came earlier than others is before them, also when it waits again.
    pub fn push(&mut self, key: Key) {
        if self.waiting.insert(key) && key.0 == Class::Batch {
            self.batch += 1;
        }
    }

    /// A sequence no longer waits. Returns whether it did.
    pub fn remove(&mut self, key: Key) -> bool {
        let first = self.first(Class::Batch);
        let removed = self.waiting.remove(&key);
        self.batch -= usize::from(removed && key.0 == Class::Batch);
        if removed && first == Some(key) {
            self.passed = 0;
        }
        removed
    }

    /// An interactive request was given room that the first batch request could have had.
    pub fn pass(&mut self) {
        self.passed += u32::from(self.batch > 0);
    }

    /// The sequences, first to last of each class.
    pub fn iter(&self) -> impl Iterator<Item = Key> + '_ {
        self.waiting.iter().copied()
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// How many of each class wait, in the order of [`Class`].
    #[must_use]
    pub fn by_class(&self) -> [usize; 2] {
        [self.waiting.len() - self.batch, self.batch]
    }

    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn first(&self, class: Class) -> Option<Key> {
        self.waiting.range((class, SeqId(0))..).next().copied().filter(|key| key.0 == class)
    }

    /// Who is offered room first, and then, if that one may be passed and did not fit, second.
    #[must_use]
    pub fn offers(&self) -> [Option<Offer>; 2] {
        let (interactive, batch) = (self.first(Class::Interactive), self.first(Class::Batch));
        let offer = |key: Option<Key>, may_pass, its_turn| key.map(|key| Offer { key, may_pass, its_turn });
        match (interactive, batch) {
            (Some(_), Some(_)) if self.passed >= PASSED_FIRST => {
                [offer(batch, self.passed < PASSED_MAX, true), offer(interactive, false, false)]
            }
            // A batch request never takes room that an interactive one waits for.
            (Some(_), _) => [offer(interactive, false, false), None],
            (None, batch) => [offer(batch, false, false), None],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(class: Class, seq: u64) -> Key {
        (class, SeqId(seq))
    }

    #[test]
    fn interactive_first_but_batch_is_not_passed_for_ever() {
        let mut queue = Queue::default();
        queue.push(key(Class::Batch, 1));
        for seq in 2..200 {
            queue.push(key(Class::Interactive, seq));
        }
        let mut passed = 0;
        while let [Some(offer), _] = queue.offers()
            && offer.key.0 == Class::Interactive
        {
            assert_eq!(offer.key, key(Class::Interactive, u64::from(passed) + 2));
            queue.remove(offer.key);
            queue.pass();
            passed += 1;
        }
        assert_eq!(passed, PASSED_FIRST);
        // It did not fit: others may pass, but not for ever.
        while let [Some(Offer { may_pass: true, .. }), Some(second)] = queue.offers() {
            queue.remove(second.key);
            queue.pass();
            passed += 1;
        }
        assert_eq!(passed, PASSED_MAX);
        let [Some(first), _] = queue.offers() else { panic!("somebody waits") };
        assert_eq!(first, Offer { key: key(Class::Batch, 1), may_pass: false, its_turn: true });
        queue.remove(first.key);
        assert_eq!(queue.offers()[0].unwrap().key.0, Class::Interactive);
    }

    #[test]
    fn who_gives_up_waiting_has_passed_nobody() {
        let mut queue = Queue::default();
        queue.push(key(Class::Batch, 1));
        for seq in 2..200 {
            queue.push(key(Class::Interactive, seq));
        }
        (2..100).for_each(|seq| assert!(queue.remove(key(Class::Interactive, seq))));
        assert_eq!(queue.offers()[0].unwrap().key, key(Class::Interactive, 100));
    }

    #[test]
    fn who_came_first_is_first_again_after_a_preemption() {
        let mut queue = Queue::default();
        for seq in [5, 6, 7] {
            queue.push(key(Class::Interactive, seq));
        }
        queue.push(key(Class::Interactive, 2));
        assert_eq!(queue.offers()[0].unwrap().key, key(Class::Interactive, 2));
        assert_eq!(queue.len(), 4);
    }
}
