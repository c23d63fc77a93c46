//! The state of one sequence on this rank.

use std::collections::BTreeMap;

use phalanx_kernels::Edit;
use phalanx_model::weights::pool_index;
use phalanx_proto::{Admission, BlockGrant, Pool, Sampling, TokenId};

use crate::constraints::Constraint;

/// No block has been given for this stretch.
const NO_BLOCK: u32 = u32::MAX;

/// A sequence that lives on this rank.
pub(super) struct Sequence {
    pub(super) sampling: Sampling,
    /// Where the backend keeps the token sampled last.
    pub(super) slot: u32,
    /// Whether a token is there, or will be once the steps under way are done.
    pub(super) has_sampled: bool,
    /// Position of the token sampled last, if what is chosen depends on it.
    pub(super) sampled: Option<u32>,
    /// Positions whose keys and values are written.
    pub(super) reached: u32,
    /// Block of each stretch, for each pool.
    pub(super) tables: [Vec<u32>; 2],
    /// What is known of tokens that are not chosen by their logits alone.
    pub(super) past: Past,
    /// What its tokens must obey; away while a step evaluates it.
    pub(super) constraint: Option<Box<dyn Constraint>>,
    /// Tokens that have come and that the constraint has not been told.
    pub(super) news: Vec<TokenId>,
}

impl Sequence {
    pub(super) fn new(admission: &Admission, slot: u32, constraint: Option<Box<dyn Constraint>>) -> Self {
        let news = if constraint.is_some() { admission.history.generated.clone() } else { Vec::new() };
        Self {
            sampling: admission.sampling,
            slot,
            has_sampled: false,
            sampled: None,
            reached: admission.cached,
            tables: [Vec::new(), Vec::new()],
            past: Past::new(admission),
            constraint,
            news,
        }
    }

    pub(super) fn grant(&mut self, grants: &[BlockGrant]) {
        for grant in grants {
            let table = &mut self.tables[pool_index(grant.pool)];
            let index = grant.index as usize;
            if table.len() <= index {
                table.resize(index + 1, NO_BLOCK);
            }
            table[index] = grant.block.0;
        }
    }

    /// Whether it has a block for this stretch.
    pub(super) fn holds(&self, pool: Pool, index: u32) -> bool {
        self.tables[pool_index(pool)].get(index as usize).is_some_and(|&block| block != NO_BLOCK)
    }

    /// Whether what is chosen depends on the tokens before.
    pub(super) fn looks_back(&self) -> bool {
        self.sampling.looks_back() || self.constraint.is_some()
    }

    /// Tokens have been sampled; the last of them for `position`.
    pub(super) fn sampled(&mut self, tokens: &[TokenId], position: u32) {
        self.sampled = Some(position);
        if self.sampling.looks_back() {
            tokens.iter().for_each(|&token| self.past.generated(token));
        }
        if self.constraint.is_some() {
            self.news.extend(tokens);
        }
    }
}

/// What changes the logits of one token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Known {
    bias: f32,
    /// It is in the prompt.
    given: bool,
    /// How often it is in the answer.
    generated: u32,
}

/// The tokens whose logits are changed before the choice: those with a bias, and if the sampling looks back, those that
/// came before. Never more than the biases and the context together.
#[derive(Clone, Debug, Default)]
pub(super) struct Past(BTreeMap<TokenId, Known>);

impl Past {
    fn new(admission: &Admission) -> Self {
        let Admission { sampling, bias, history, .. } = admission;
        let mut past = Self(bias.iter().map(|&(token, bias)| (token, Known { bias, ..Known::default() })).collect());
        // Other penalties look at the answer alone.
        if sampling.repetition_penalty != 1.0 {
            for &token in &history.prompt {
                past.0.entry(token).or_default().given = true;
            }
        }
        if sampling.looks_back() {
            history.generated.iter().for_each(|&token| past.generated(token));
        }
        past
    }

    /// A token of the answer.
    pub(super) fn generated(&mut self, token: TokenId) {
        self.0.entry(token).or_default().generated += 1;
    }

    /// The changes to logits, in the order of tokens.
    pub(super) fn edits(&self, sampling: &Sampling) -> Vec<Edit> {
        let edit = |(token, known): (&TokenId, &Known)| {
            let Known { bias, given, generated } = *known;
            let before = given || generated > 0;
            let penalty = sampling.presence_penalty + sampling.frequency_penalty * generated as f32;
            Edit {
                token: token.0,
                repetition: if before { sampling.repetition_penalty } else { 1.0 },
                add: if generated > 0 { bias - penalty } else { bias },
            }
        };
        self.0.iter().map(edit).collect()
    }
}
