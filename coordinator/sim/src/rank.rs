//! A rank that computes nothing and remembers everything: what its KV memory would hold, position by position, and who
//! may still read it.

use std::collections::{BTreeMap, VecDeque};

use phalanx_proto::{
    Admission, ConstraintStart, ConstraintTable, Fence, KvOp, Limits, Outputs, PlanError, Pool, Position, Rank, Rows,
    RowsResult, SeqId, Start, StepId, StepPlan, StepResult, TableId, TokenId, Tokens,
};

use crate::truth::{Chooser, PrefixHash, logits};

/// What a rank finds wrong with a plan. Each is a mistake of whoever planned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RankError {
    /// The plan is none that a worker takes.
    #[error("step {}: {}", .0.0, .1)]
    Plan(StepId, PlanError),
    /// A step was left out, or a result is asked for that was acknowledged long ago.
    #[error("the plan is of {theirs}, this rank has run {ours} and keeps {kept} results")]
    Fence {
        /// The plan's.
        theirs: Fence,
        /// The last step run.
        ours: Fence,
        /// Results kept.
        kept: usize,
    },
    /// The header does not fit the plan or the state of the rank.
    #[error("step {}: {}", .0.0, .1)]
    Header(StepId, &'static str),
    /// The plan does not fit the state of a sequence.
    #[error("step {}: sequence {seq}: {why}", .step.0)]
    Sequence {
        /// The step.
        step: StepId,
        /// The sequence.
        seq: SeqId,
        /// What does not fit.
        why: &'static str,
    },
    /// A row sees a position whose block holds something else.
    #[error("step {}: sequence {seq} sees position {position} in {pool:?} block {block}, which holds {found}", .step.0)]
    Memory {
        /// The step.
        step: StepId,
        /// The sequence.
        seq: SeqId,
        /// The position.
        position: u32,
        /// Pool of the block.
        pool: Pool,
        /// The block.
        block: u32,
        /// What it holds.
        found: &'static str,
    },
    /// A block is written that another sequence uses in a step whose result is not applied: that step cannot be repeated.
    #[error(
        "step {}: sequence {seq} writes {pool:?} block {block}, which sequence {user} uses in step {}, but only {} is applied",
        .step.0, .used.0, .answered.0
    )]
    Reused {
        /// The step.
        step: StepId,
        /// The sequence that writes.
        seq: SeqId,
        /// Pool of the block.
        pool: Pool,
        /// The block.
        block: u32,
        /// The sequence that uses it.
        user: SeqId,
        /// When.
        used: StepId,
        /// The last step of this rank that was applied when this one was planned.
        answered: StepId,
    },
    /// A row sees what another sequence writes in a step whose result is not applied: if that step is lost, so is this.
    #[error(
        "step {}: sequence {seq} sees {pool:?} block {block}, which sequence {writer} writes in step {}, but only {} is applied",
        .step.0, .written.0, .answered.0
    )]
    Unapplied {
        /// The step.
        step: StepId,
        /// The sequence that sees it.
        seq: SeqId,
        /// Pool of the block.
        pool: Pool,
        /// The block.
        block: u32,
        /// The sequence that writes it.
        writer: SeqId,
        /// When.
        written: StepId,
        /// The last step of this rank that was applied when this one was planned.
        answered: StepId,
    },
}

/// What a position of a block holds; the default where nobody wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Held {
    /// Of the whole prefix up to the position.
    prefix: PrefixHash,
    token: TokenId,
}

/// The blocks of one pool.
#[derive(Clone, Debug)]
struct Memory {
    pool: Pool,
    /// `[blocks * block_size]`.
    held: Vec<Held>,
    /// The last use of each block: by whom, and in which step.
    used: Vec<(SeqId, StepId)>,
    /// The last write to each block: by whom, and in which step.
    written: Vec<(SeqId, StepId)>,
}

/// A sequence that lives on the rank.
#[derive(Clone, Debug)]
struct Sequence {
    /// Block of each stretch, in [`Pool::Full`] and [`Pool::Window`].
    tables: [BTreeMap<u32, u32>; 2],
    /// What its positions hold, as far as it knows. Positions that were cached are known once they were looked at.
    known: Vec<Held>,
    cached: u32,
    last: Option<TokenId>,
    /// Position of the token sampled last.
    sampled: Option<u32>,
    chooser: Chooser,
}

/// A rank that holds every plan against what a worker must refuse or would get wrong.
#[derive(Clone, Debug)]
pub struct VirtualRank {
    rank: Rank,
    limits: Limits,
    window: u32,
    vocab: u32,
    /// Results kept at most.
    kept_max: usize,
    fence: Fence,
    memory: [Memory; 2],
    sequences: BTreeMap<SeqId, Sequence>,
    tables: BTreeMap<TableId, ConstraintTable>,
    results: VecDeque<StepResult>,
}

const POOLS: [Pool; 2] = [Pool::Full, Pool::Window];

impl VirtualRank {
    /// A rank of a cell that has up to `depth` steps under way, ready for the step after `fence`.
    #[must_use]
    pub fn new(rank: Rank, limits: Limits, window: u32, vocab: u32, depth: u32, fence: Fence) -> Self {
        let memory = POOLS.map(|pool| {
            let blocks = limits.blocks(pool) as usize;
            let held = vec![Held::default(); blocks * limits.block_size as usize];
            let never = vec![(SeqId(0), StepId(0)); blocks];
            Memory { pool, held, used: never.clone(), written: never }
        });
        Self {
            rank,
            limits,
            window,
            vocab,
            kept_max: depth as usize + 1,
            fence,
            memory,
            sequences: BTreeMap::new(),
            tables: BTreeMap::new(),
            results: VecDeque::new(),
        }
    }

    /// Runs a plan, or gives the result of one that was run before. `answered` is the last step of this rank whose result
    /// was applied when the plan was made.
    ///
    /// # Errors
    /// A plan that a worker must refuse, or that makes one compute something else than was meant.
    pub fn run(&mut self, plan: &StepPlan, answered: StepId) -> Result<StepResult, RankError> {
        let fence = plan.header.fence;
        if let Some(result) = self.results.iter().find(|result| result.fence == fence) {
            return Ok(result.clone());
        }
        if fence != self.fence.next() {
            return Err(RankError::Fence { theirs: fence, ours: self.fence, kept: self.results.len() });
        }
        plan.check(&self.limits, self.vocab).map_err(|error| RankError::Plan(fence.step, error))?;
        self.check_header(plan)?;
        self.results.retain(|result| result.fence.step > plan.header.applied);

        self.begin(plan)?;
        for &KvOp::Copy { from, to } in &plan.kv_ops {
            let size = self.limits.block_size as usize;
            let held = &mut self.memory[at(from.pool)].held;
            held.copy_within(from.block.index() * size..(from.block.index() + 1) * size, to.block.index() * size);
        }
        // As on a real rank, every row is written before any is read.
        let mut starts = Vec::with_capacity(plan.rows.len());
        for rows in &plan.rows {
            starts.push(self.write(rows, answered)?);
        }
        for (rows, &start) in plan.rows.iter().zip(&starts) {
            self.read(rows, start, answered)?;
        }
        let mut result = StepResult { fence, rank: self.rank, ..StepResult::default() };
        for (rows, &start) in plan.rows.iter().zip(&starts) {
            result.rows.extend(self.output(rows, start)?);
        }
        self.fence = fence;
        self.results.push_back(result.clone());
        if self.results.len() > self.kept_max {
            return Err(RankError::Header(fence.step, "more results are not acknowledged than a rank keeps"));
        }
        Ok(result)
    }

    fn check_header(&self, plan: &StepPlan) -> Result<(), RankError> {
        let header = &plan.header;
        let fail = |why| Err(RankError::Header(header.fence.step, why));
        let said = header.rows_of_rank.get(self.rank.index()).copied();
        if said.map(|rows| rows as usize) != Some(plan.row_count()) {
            return fail("the header says another number of rows");
        }
        if header.applied >= header.fence.step {
            return fail("the step is acknowledged before it is run");
        }
        Ok(())
    }

    /// Tables, releases and admissions.
    fn begin(&mut self, plan: &StepPlan) -> Result<(), RankError> {
        let step = plan.header.fence.step;
        let fail = |seq, why| Err(RankError::Sequence { step, seq, why });
        for table in &plan.tables {
            if self.tables.insert(table.id, table.clone()).is_some() {
                return Err(RankError::Header(step, "a constraint table is sent twice"));
            }
        }
        for &seq in &plan.release {
            if self.sequences.remove(&seq).is_none() {
                return fail(seq, "it is released but does not live here");
            }
        }
        for admission in &plan.admit {
            let sequence = self.admitted(step, admission)?;
            if self.sequences.insert(admission.seq, sequence).is_some() {
                return fail(admission.seq, "it is admitted twice");
            }
        }
        if self.sequences.len() > self.limits.seqs_max as usize {
            return Err(RankError::Header(step, "more sequences live here than may"));
        }
        Ok(())
    }

    fn admitted(&self, step: StepId, admission: &Admission) -> Result<Sequence, RankError> {
        let seq = admission.seq;
        let constraint = match admission.constraint {
            None => None,
            Some(ConstraintStart { table, state }) => {
                let table = self.tables.get(&table).filter(|table| (state as usize) < table.states());
                let why = "it is constrained by a table or a state that is not here";
                Some((table.ok_or(RankError::Sequence { step, seq, why })?.clone(), state))
            }
        };
        let history = &admission.history;
        Ok(Sequence {
            tables: [BTreeMap::new(), BTreeMap::new()],
            known: Vec::new(),
            cached: admission.cached,
            last: None,
            sampled: None,
            chooser: Chooser::new(admission.sampling, &admission.bias, constraint, &history.prompt, &history.generated),
        })
    }

    /// Takes the grants of a run of rows and writes its positions. Returns the first.
    fn write(&mut self, rows: &Rows, answered: StepId) -> Result<u32, RankError> {
        let (seq, step, size) = (rows.seq, self.fence.next().step, self.limits.block_size);
        let fail = |why| RankError::Sequence { step, seq, why };
        let sequence = self.sequences.get_mut(&seq).ok_or_else(|| fail("it does not live here"))?;
        for grant in &rows.grants {
            sequence.tables[at(grant.pool)].insert(grant.index, grant.block.0);
        }
        for position in count(sequence.known.len())..std::mem::take(&mut sequence.cached) {
            let held = cached(&self.memory[0], sequence, position, size, step, seq)?;
            sequence.known.push(held);
        }
        let reached = count(sequence.known.len());
        let start = match rows.start {
            Start::At(position) => position.0,
            Start::AfterPrevious => reached,
        };
        if start > reached {
            return Err(fail("its rows begin beyond the positions computed"));
        }
        let previous = || sequence.last.ok_or_else(|| fail("it has sampled no token yet"));
        let tokens = match &rows.tokens {
            Tokens::Given(tokens) => tokens.clone(),
            Tokens::Previous => vec![previous()?],
            Tokens::Draft(_) => return Err(fail("nobody guesses here")),
        };
        if u64::from(start) + tokens.len() as u64 > u64::from(self.limits.context) {
            return Err(fail("its rows exceed the context"));
        }
        if matches!(rows.tokens, Tokens::Previous) && sequence.sampled != Some(start) {
            return Err(fail("the token sampled last belongs to another position"));
        }
        sequence.known.truncate(start as usize);
        for token in tokens {
            let position = count(sequence.known.len());
            let before = sequence.known.last().map_or_else(PrefixHash::default, |held| held.prefix);
            let held = Held { prefix: before.then(token), token };
            sequence.known.push(held);
            for memory in &mut self.memory {
                let block = sequence.tables[at(memory.pool)].get(&(position / size));
                let block = *block.ok_or_else(|| fail("it has no block for a position it writes"))?;
                let (user, used) = memory.used[block as usize];
                if user != seq && used > answered {
                    return Err(RankError::Reused { step, seq, pool: memory.pool, block, user, used, answered });
                }
                memory.held[(block * size + position % size) as usize] = held;
                memory.written[block as usize] = (seq, step);
            }
        }
        Ok(start)
    }

    /// Every position that the rows see must hold what belongs there.
    fn read(&mut self, rows: &Rows, start: u32, answered: StepId) -> Result<(), RankError> {
        let (seq, step, size) = (rows.seq, self.fence.next().step, self.limits.block_size);
        let sequence = &self.sequences[&seq];
        for memory in &mut self.memory {
            let pool = memory.pool;
            let first = match pool {
                Pool::Full => 0,
                Pool::Window => (start + 1).saturating_sub(self.window),
            };
            for (position, expected) in (0u32..).zip(&sequence.known).skip(first as usize) {
                let block = sequence.tables[at(pool)].get(&(position / size));
                let why = "it has no block for a position it sees";
                let block = *block.ok_or(RankError::Sequence { step, seq, why })?;
                let found = memory.held[(block * size + position % size) as usize];
                if found != *expected {
                    let empty = found == Held::default();
                    let found = if empty { "nothing" } else { "the keys and values of another prefix" };
                    return Err(RankError::Memory { step, seq, position, pool, block, found });
                }
                let (writer, written) = memory.written[block as usize];
                if writer != seq && written > answered {
                    return Err(RankError::Unapplied { step, seq, pool, block, writer, written, answered });
                }
                memory.used[block as usize] = (seq, step);
            }
        }
        Ok(())
    }

    /// What a run of rows gives, if it was asked for anything.
    fn output(&mut self, rows: &Rows, start: u32) -> Result<Option<RowsResult>, RankError> {
        let (seq, step, vocab) = (rows.seq, self.fence.next().step, self.vocab);
        let fail = |why| Err(RankError::Sequence { step, seq, why });
        let Some(sequence) = self.sequences.get_mut(&seq) else { return fail("it does not live here") };
        let mut result = RowsResult {
            seq,
            position: Position(start + 1),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            logits: Vec::new(),
        };
        match rows.outputs {
            Outputs::None => return Ok(None),
            Outputs::Verify => return fail("it has no guesses to verify"),
            Outputs::AllLogits => {
                let of_rows = sequence.known.iter().skip(start as usize);
                result.logits = of_rows.flat_map(|held| logits(held.prefix, vocab)).collect();
            }
            Outputs::Sample => {
                let end = count(sequence.known.len());
                if sequence.chooser.looks_back() && sequence.sampled >= Some(end) {
                    return fail("it would sample again what its later tokens depend on");
                }
                let prefix = sequence.known.last().map_or_else(PrefixHash::default, |held| held.prefix);
                let (token, logprobs) = sequence.chooser.choose(prefix, vocab);
                (sequence.last, sequence.sampled) = (Some(token), Some(end));
                result.position = Position(end);
                result.tokens.push(token);
                result.logprobs.extend(logprobs);
            }
        }
        Ok(Some(result))
    }
}

/// What a cached position holds: it must continue the prefix before it.
fn cached(
    memory: &Memory,
    sequence: &Sequence,
    position: u32,
    size: u32,
    step: StepId,
    seq: SeqId,
) -> Result<Held, RankError> {
    let why = "it has no block for a position that is said to be cached";
    let block = sequence.tables[at(Pool::Full)].get(&(position / size));
    let block = *block.ok_or(RankError::Sequence { step, seq, why })?;
    let held = memory.held[(block * size + position % size) as usize];
    let before = sequence.known.last().map_or_else(PrefixHash::default, |held| held.prefix);
    if held.prefix == before.then(held.token) {
        return Ok(held);
    }
    let found = if held == Held::default() { "nothing" } else { "no continuation of the positions before" };
    Err(RankError::Memory { step, seq, position, pool: Pool::Full, block, found })
}

const fn at(pool: Pool) -> usize {
    match pool {
        Pool::Full => 0,
        Pool::Window => 1,
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("sequences are bounded by the context")
}
