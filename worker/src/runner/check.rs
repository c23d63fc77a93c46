//! Whether a plan fits the state of its sequences. Nothing is touched before all of it does.

use std::collections::{BTreeMap, BTreeSet};

use phalanx_kernels::Backend;
use phalanx_model::Collectives;
use phalanx_model::weights::pool_of;
use phalanx_proto::{
    Admission, ConstraintStart, ConstraintTable, LayerKind, Outputs, PlanError, Pool, Rows, SeqId, StepPlan, TableId,
    Tokens,
};

use super::sequence::Sequence;
use super::{Runner, StepError, first_position};

/// A sequence as the rows of a plan will find it.
#[derive(Clone, Copy)]
enum Found<'a> {
    /// It lives here.
    Living(&'a Sequence),
    /// It is admitted with the plan.
    Admitted(&'a Admission),
}

impl Found<'_> {
    fn reached(self) -> u32 {
        match self {
            Self::Living(sequence) => sequence.reached,
            Self::Admitted(admission) => admission.cached,
        }
    }

    fn holds(self, pool: Pool, index: u32) -> bool {
        matches!(self, Self::Living(sequence) if sequence.holds(pool, index))
    }

    /// Whether it has a token that [`Tokens::Previous`] stands for.
    fn has_sampled(self) -> bool {
        matches!(self, Self::Living(sequence) if sequence.has_sampled)
    }

    /// Whether a token for `position` would be chosen as if those sampled there and beyond were its past.
    fn is_past(self, position: u32) -> bool {
        matches!(self, Self::Living(sequence) if sequence.looks_back() && sequence.sampled >= Some(position))
    }
}

impl<B: Backend, C: Collectives<B::Parts>> Runner<B, C> {
    /// Checks the plan against the state of this rank.
    pub(super) fn check(&self, plan: &StepPlan) -> Result<(), StepError> {
        plan.check(&self.limits, self.model.config().vocab)?;
        // How rows travel is chosen by the header, on all ranks alike.
        let (rank, rows, said) = (self.rank(), plan.row_count(), &plan.header.rows_of_rank);
        let mine = said.get(rank.index()).is_some_and(|&said| said as usize == rows);
        if !mine || said.len() != self.collectives.size() as usize {
            return Err(StepError::Header { rank, rows, said: said.clone() });
        }
        let states = self.check_tables(plan)?;

        let released: BTreeSet<SeqId> = plan.release.iter().copied().collect();
        let living = |seq| self.sequences.get(&seq).filter(|_| !released.contains(&seq));
        let mut admitted = BTreeMap::new();
        for admission in &plan.admit {
            let seq = admission.seq;
            let fail = |why| Err(StepError::Sequence { seq, why });
            if living(seq).is_some() || admitted.insert(seq, admission).is_some() {
                return fail("it is admitted twice");
            }
            if admission.cached > self.limits.context {
                return fail("its cached positions exceed the context");
            }
            if let Some(ConstraintStart { table, state }) = admission.constraint
                && states.get(&table).is_none_or(|&states| state as usize >= states)
            {
                return fail("it is constrained by a table or a state that is not here");
            }
        }
        let leave = released.iter().filter(|seq| self.sequences.contains_key(seq)).count();
        let (asked, max) = (self.sequences.len() - leave + admitted.len(), self.limits.seqs_max as usize);
        if asked > max {
            return Err(PlanError::TooMany { what: "sequences", asked, max }.into());
        }
        for rows in &plan.rows {
            let found = living(rows.seq).map(Found::Living);
            let Some(found) = found.or_else(|| admitted.get(&rows.seq).map(|&admission| Found::Admitted(admission)))
            else {
                return Err(StepError::Sequence { seq: rows.seq, why: "it does not live on this rank" });
            };
            self.check_rows(rows, found).map_err(|why| StepError::Sequence { seq: rows.seq, why })?;
        }
        Ok(())
    }

    /// States of each table that admissions may name.
    fn check_tables(&self, plan: &StepPlan) -> Result<BTreeMap<TableId, usize>, StepError> {
        let mut states: BTreeMap<TableId, usize> = self.tables.iter().map(|(&id, t)| (id, t.states())).collect();
        for table in &plan.tables {
            if states.insert(table.id, table.states()).is_some() {
                return Err(StepError::Table(table.id));
            }
        }
        let (asked, max) = (states.len(), ConstraintTable::TABLES_MAX as usize);
        if asked > max { Err(PlanError::TooMany { what: "tables", asked, max }.into()) } else { Ok(states) }
    }

    fn check_rows(&self, rows: &Rows, found: Found<'_>) -> Result<(), &'static str> {
        let start = first_position(rows.start, found.reached());
        if start > found.reached() {
            return Err("its rows begin beyond the positions computed");
        }
        let count = u32::try_from(rows.tokens.rows()).ok();
        let end = count.and_then(|count| start.checked_add(count)).ok_or("its rows overflow")?;
        if end > self.limits.context {
            return Err("its rows exceed the context");
        }
        if !matches!(rows.tokens, Tokens::Given(_)) && !found.has_sampled() {
            return Err("it has sampled no token yet");
        }
        let first_drawn = match rows.outputs {
            Outputs::None | Outputs::AllLogits => None,
            Outputs::Sample => Some(end),
            Outputs::Verify if matches!(rows.tokens, Tokens::Draft(_)) => Some(start + 1),
            Outputs::Verify => return Err("it has no guesses to verify"),
        };
        if first_drawn.is_some_and(|position| found.is_past(position)) {
            return Err("it would sample again what its later tokens depend on; admit it anew");
        }
        self.check_blocks(rows, found, start, end)
    }

    /// Every stretch that the rows write or see must have a block.
    fn check_blocks(&self, rows: &Rows, found: Found<'_>, start: u32, end: u32) -> Result<(), &'static str> {
        let config = self.model.config();
        for kind in [LayerKind::Full, LayerKind::Sliding] {
            if config.layers_of(kind) == 0 {
                continue;
            }
            let pool = pool_of(kind);
            let first = match pool {
                Pool::Full => 0,
                Pool::Window => (start + 1).saturating_sub(config.window),
            };
            let granted =
                |index: u32| found.holds(pool, index) || rows.grants.iter().any(|g| g.pool == pool && g.index == index);
            let size = self.limits.block_size;
            if !(first / size..end.div_ceil(size)).all(granted) {
                return Err("it has no block for a position it needs");
            }
        }
        Ok(())
    }
}
