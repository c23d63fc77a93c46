//! Choosing experts: the `K` largest logits, the lowest expert among equals, and the softmax over those `K`.

use super::exp::exp;
use crate::memory::resident;

/// The experts chosen for each row and their weights, `[T, K]` each.
#[derive(Debug)]
pub struct Routes {
    top_k: usize,
    experts: Vec<u32>,
    weights: Vec<f32>,
    len: usize,
}

impl Routes {
    pub(super) fn new(rows: usize, top_k: usize) -> Self {
        Self { top_k, experts: resident(rows * top_k), weights: resident(rows * top_k), len: 0 }
    }

    pub(super) fn bytes(&self) -> u64 {
        (size_of_val(&self.experts[..]) + size_of_val(&self.weights[..])) as u64
    }

    pub(super) const fn top_k(&self) -> usize {
        self.top_k
    }

    /// Rows it holds now.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Rows it has room for.
    pub(super) fn capacity(&self) -> usize {
        self.experts.len().checked_div(self.top_k).unwrap_or(0)
    }

    /// Sets how many rows it holds, at most the capacity.
    pub(super) fn set_len(&mut self, len: usize) {
        self.len = len.min(self.capacity());
    }

    /// Experts of a row, in descending order of their logits.
    pub(super) fn experts(&self, row: usize) -> &[u32] {
        &self.experts[row * self.top_k..(row + 1) * self.top_k]
    }

    /// Weights of a row's experts.
    pub(super) fn weights(&self, row: usize) -> &[f32] {
        &self.weights[row * self.top_k..(row + 1) * self.top_k]
    }

    /// Chooses for a row. There are at least `K` logits.
    pub(super) fn choose(&mut self, row: usize, logits: &[f32]) {
        let range = row * self.top_k..(row + 1) * self.top_k;
        let (experts, weights) = (&mut self.experts[range.clone()], &mut self.weights[range]);
        for (k, weight) in weights.iter_mut().enumerate() {
            let (chosen, rest) = experts.split_at_mut(k);
            let free = (0u32..).zip(logits).filter(|(expert, _)| !chosen.contains(expert));
            // NaN comes last but is chosen if nothing else is left: it then spoils its row, and no other.
            let best = free.reduce(|best, next| if rank(*next.1) > rank(*best.1) { next } else { best });
            let (expert, logit) = best.expect("a row has at least K logits");
            rest[0] = expert;
            *weight = *logit;
        }
        let largest = weights[0];
        let mut sum = 0.0;
        for weight in weights.iter_mut() {
            *weight = exp(*weight - largest);
            sum += *weight;
        }
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

/// What a logit counts as when it is compared.
fn rank(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit }
}
