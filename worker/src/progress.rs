//! Where a step is, for whoever watches from outside: written by the model thread, read by health calls.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use phalanx_model::Watch;
use phalanx_proto::{LayerIdx, Phase, Rank, StepId};
use phalanx_wire::StepProgress;

/// Where a step is. All clones are the same place.
#[derive(Clone, Debug, Default)]
pub struct ProgressCell(Arc<Mutex<Place>>);

#[derive(Debug, Default)]
struct Place {
    step: StepId,
    layer: LayerIdx,
    op: &'static str,
    waiting_for: Vec<Rank>,
}

impl ProgressCell {
    /// A step begins.
    pub fn begin(&self, step: StepId) {
        let mut place = self.lock();
        place.step = step;
        place.layer = LayerIdx(0);
        place.op = "begin";
        place.waiting_for.clear();
    }

    /// The step has come to this op of this layer, and waits for nobody.
    pub fn at(&self, layer: LayerIdx, op: &'static str) {
        let mut place = self.lock();
        place.layer = layer;
        place.op = op;
        place.waiting_for.clear();
    }

    /// The op cannot go on without bytes of these ranks.
    pub fn waiting_for(&self, ranks: impl IntoIterator<Item = Rank>) {
        let mut place = self.lock();
        place.waiting_for.clear();
        place.waiting_for.extend(ranks);
    }

    /// Where the step is now.
    #[must_use]
    pub fn get(&self) -> StepProgress {
        let place = self.lock();
        let Place { step, layer, op, ref waiting_for } = *place;
        StepProgress { step, layer, op: op.to_owned(), waiting_for: waiting_for.clone() }
    }

    /// No writer leaves a half-written place behind, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch for ProgressCell {
    fn at(&self, layer: LayerIdx, phase: Phase) {
        Self::at(self, layer, phase.name());
    }
}
