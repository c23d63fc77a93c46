//! A finite automaton over classes of tokens.

use std::collections::BTreeMap;
use std::sync::Arc;

use phalanx_proto::{ConstraintTable, TokenId};

use super::{Constraint, Mask, Refused};

/// A table with the mask of each of its states. States that allow the same classes share one, so it holds at most
/// `V / 8` bytes for each state.
#[derive(Debug)]
pub struct Table {
    table: ConstraintTable,
    /// `[states]`.
    masks: Vec<Mask>,
}

impl Table {
    /// Computes the masks of a table that [`ConstraintTable::check`] accepts for a vocabulary of `vocab` tokens.
    #[must_use]
    pub fn new(table: ConstraintTable, vocab: u32) -> Self {
        let mut made: BTreeMap<Vec<bool>, Mask> = BTreeMap::new();
        let states = (0..).take(table.states());
        let masks = states
            .map(|state| {
                let allowed: Vec<bool> = (0..table.classes).map(|class| table.step(state, class).is_some()).collect();
                Arc::clone(made.entry(allowed).or_insert_with_key(|allowed| mask(&table, allowed, vocab)))
            })
            .collect();
        Self { table, masks }
    }

    /// States there are.
    #[must_use]
    pub fn states(&self) -> usize {
        self.masks.len()
    }

    /// The automaton in `state`.
    #[must_use]
    pub fn at(self: &Arc<Self>, state: u32) -> Box<dyn Constraint> {
        Box::new(InTable { table: Arc::clone(self), state })
    }

    fn step(&self, state: u32, token: TokenId) -> Option<u32> {
        self.table.step(state, self.table.class(token)?)
    }
}

/// The tokens of the classes that are `allowed`.
fn mask(table: &ConstraintTable, allowed: &[bool], vocab: u32) -> Mask {
    let mut words = vec![0u64; vocab.div_ceil(64) as usize];
    let ends = table.runs.iter().skip(1).map(|(next, _)| next.0).chain([vocab]);
    for (&(first, class), end) in table.runs.iter().zip(ends) {
        if allowed.get(class as usize) == Some(&true) {
            for token in first.0..end.min(vocab) {
                words[token as usize / 64] |= 1 << (token % 64);
            }
        }
    }
    words.into()
}

struct InTable {
    table: Arc<Table>,
    state: u32,
}

impl Constraint for InTable {
    fn masks(&mut self, guesses: &[TokenId]) -> Vec<Mask> {
        let after = |state: &u32, guess: &TokenId| self.table.step(*state, *guess);
        let mut states = vec![self.state];
        for guess in guesses {
            match states.last().and_then(|state| after(state, guess)) {
                Some(state) => states.push(state),
                None => break,
            }
        }
        states.iter().map(|&state| Arc::clone(&self.table.masks[state as usize])).collect()
    }

    fn advance(&mut self, token: TokenId) -> Result<(), Refused> {
        self.state = self.table.step(self.state, token).ok_or(Refused(token))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::TableId;

    use super::*;

    const REFUSED: u32 = ConstraintTable::REFUSED;

    /// Classes: 0 is tokens 0..70 and 130.., 1 is 70..129, 2 is 129. State 0 allows 0 and 1, state 1 only 2, state 2
    /// the same as state 0.
    fn table() -> Arc<Table> {
        let runs = vec![(TokenId(0), 0), (TokenId(70), 1), (TokenId(129), 2), (TokenId(130), 0)];
        let next = vec![0, 1, REFUSED, REFUSED, REFUSED, 2, 2, 2, REFUSED];
        let table = ConstraintTable { id: TableId(0), runs, classes: 3, next };
        table.check(200).unwrap();
        Arc::new(Table::new(table, 200))
    }

    fn allowed(mask: &Mask) -> Vec<u32> {
        (0..200).filter(|&token| mask[token as usize / 64] >> (token % 64) & 1 == 1).collect()
    }

    #[test]
    fn a_mask_has_the_tokens_of_its_classes_and_equal_ones_are_shared() {
        let table = table();
        assert_eq!(table.masks[0].len(), 4);
        assert_eq!(table.masks[0][3] >> 8, 0, "no bit beyond the vocabulary");
        assert_eq!(allowed(&table.masks[0]), (0..129).chain(130..200).collect::<Vec<_>>());
        assert_eq!(allowed(&table.masks[1]), [129]);
        assert!(Arc::ptr_eq(&table.masks[0], &table.masks[2]));
    }

    #[test]
    fn it_moves_on_over_tokens_and_refuses_others() {
        let table = table();
        let mut here = table.at(0);
        here.advance(TokenId(3)).unwrap();
        here.advance(TokenId(70)).unwrap();
        assert_eq!(here.advance(TokenId(3)), Err(Refused(TokenId(3))));
        assert_eq!(allowed(&here.masks(&[])[0]), [129]);
        here.advance(TokenId(129)).unwrap();
        assert!(Arc::ptr_eq(&here.masks(&[])[0], &table.masks[2]));
    }

    #[test]
    fn guesses_have_masks_as_far_as_they_may_come() {
        let mut here = table().at(0);
        let (free, narrow) = (here.masks(&[])[0].clone(), table().masks[1].clone());
        let after = |here: &mut Box<dyn Constraint>, guesses: &[u32]| {
            let guesses: Vec<TokenId> = guesses.iter().map(|&token| TokenId(token)).collect();
            here.masks(&guesses)
        };
        assert_eq!(after(&mut here, &[1, 70, 129]), [&free, &free, &narrow, &free].map(Arc::clone));
        assert_eq!(after(&mut here, &[70, 1, 129]), [&free, &narrow].map(Arc::clone));
        assert_eq!(after(&mut here, &[129]), [Arc::clone(&free)]);
    }
}
