//! Plans and what came of them.

use phalanx_proto::{
    Admission, BlockAddress, BlockGrant, BlockId, ConstraintStart, ConstraintTable, Epoch, ExchangeCounters, Fence,
    History, KvOp, Layout, Outputs, Phase, PhaseTimes, Pool, Position, Rank, Rows, RowsResult, Sampling, SeqId, Start,
    StepHeader, StepId, StepPlan, StepResult, TableId, Term, Tier, TokenId, TokenLogprobs, Tokens,
};

use crate::control::{StepFailure, StepReply, TEXT_BYTES_MAX, cut};
use crate::error::{WireError, all, at_most, brief, known, present, short};
use crate::v1;

impl From<Fence> for v1::Fence {
    fn from(fence: Fence) -> Self {
        let Fence { term, epoch, step } = fence;
        Self { term: term.0, epoch: epoch.0, step: step.0 }
    }
}

/// A fence; numbers so high that the next one would overflow are refused.
pub(crate) fn fence(fence: Option<v1::Fence>) -> Result<Fence, WireError> {
    let v1::Fence { term, epoch, step } = present("fence", fence)?;
    let counter = |value| at_most("fence", value, u64::MAX >> 1);
    Ok(Fence { term: Term(counter(term)?), epoch: Epoch(counter(epoch)?), step: StepId(counter(step)?) })
}

impl From<Pool> for v1::Pool {
    fn from(pool: Pool) -> Self {
        match pool {
            Pool::Full => Self::Full,
            Pool::Window => Self::Window,
        }
    }
}

fn pool(value: i32) -> Result<Pool, WireError> {
    match known("pool", value)? {
        v1::Pool::Full => Ok(Pool::Full),
        v1::Pool::Window => Ok(Pool::Window),
        v1::Pool::Unspecified => Err(WireError::Unknown { field: "pool", value }),
    }
}

impl From<Tier> for v1::Tier {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Device => Self::Device,
            Tier::Host => Self::Host,
        }
    }
}

fn tier(value: i32) -> Result<Tier, WireError> {
    match known("tier", value)? {
        v1::Tier::Device => Ok(Tier::Device),
        v1::Tier::Host => Ok(Tier::Host),
        v1::Tier::Unspecified => Err(WireError::Unknown { field: "tier", value }),
    }
}

impl From<Outputs> for v1::Outputs {
    fn from(outputs: Outputs) -> Self {
        match outputs {
            Outputs::None => Self::None,
            Outputs::Sample => Self::Sample,
            Outputs::AllLogits => Self::AllLogits,
            Outputs::Verify => Self::Verify,
        }
    }
}

fn outputs(value: i32) -> Result<Outputs, WireError> {
    match known("outputs", value)? {
        v1::Outputs::None => Ok(Outputs::None),
        v1::Outputs::Sample => Ok(Outputs::Sample),
        v1::Outputs::AllLogits => Ok(Outputs::AllLogits),
        v1::Outputs::Verify => Ok(Outputs::Verify),
        v1::Outputs::Unspecified => Err(WireError::Unknown { field: "outputs", value }),
    }
}

impl From<BlockAddress> for v1::BlockAddress {
    fn from(address: BlockAddress) -> Self {
        let BlockAddress { pool, tier, block } = address;
        Self { pool: v1::Pool::from(pool).into(), tier: v1::Tier::from(tier).into(), block: block.0 }
    }
}

impl TryFrom<v1::BlockAddress> for BlockAddress {
    type Error = WireError;

    fn try_from(address: v1::BlockAddress) -> Result<Self, WireError> {
        Ok(Self { pool: pool(address.pool)?, tier: tier(address.tier)?, block: BlockId(address.block) })
    }
}

impl From<KvOp> for v1::KvOp {
    fn from(op: KvOp) -> Self {
        let op = match op {
            KvOp::Copy { from, to } => v1::kv_op::Op::Copy(v1::KvCopy { from: Some(from.into()), to: Some(to.into()) }),
        };
        Self { op: Some(op) }
    }
}

impl TryFrom<v1::KvOp> for KvOp {
    type Error = WireError;

    fn try_from(op: v1::KvOp) -> Result<Self, WireError> {
        match present("op", op.op)? {
            v1::kv_op::Op::Copy(v1::KvCopy { from, to }) => {
                Ok(Self::Copy { from: present("from", from)?.try_into()?, to: present("to", to)?.try_into()? })
            }
        }
    }
}

impl From<BlockGrant> for v1::BlockGrant {
    fn from(grant: BlockGrant) -> Self {
        let BlockGrant { pool, index, block } = grant;
        Self { pool: v1::Pool::from(pool).into(), index, block: block.0 }
    }
}

impl TryFrom<v1::BlockGrant> for BlockGrant {
    type Error = WireError;

    fn try_from(grant: v1::BlockGrant) -> Result<Self, WireError> {
        Ok(Self { pool: pool(grant.pool)?, index: grant.index, block: BlockId(grant.block) })
    }
}

impl From<Sampling> for v1::Sampling {
    fn from(sampling: Sampling) -> Self {
        let Sampling { temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty, .. } = sampling;
        let Sampling { repetition_penalty, seed, choice, logprobs, .. } = sampling;
        Self {
            temperature,
            top_p,
            seed,
            choice,
            top_k,
            min_p,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            logprobs,
        }
    }
}

impl TryFrom<v1::Sampling> for Sampling {
    type Error = WireError;

    fn try_from(sampling: v1::Sampling) -> Result<Self, WireError> {
        let v1::Sampling { temperature, top_p, seed, choice, top_k, min_p, presence_penalty, .. } = sampling;
        let v1::Sampling { frequency_penalty, repetition_penalty, logprobs, .. } = sampling;
        let sampling = Self {
            temperature,
            top_k,
            top_p,
            min_p,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            seed,
            choice,
            logprobs,
        };
        sampling.check().map_err(|(field, range)| WireError::invalid(field, range))?;
        Ok(sampling)
    }
}

/// Two columns of equal length, row by row.
fn rows<A, B>(field: &'static str, a: Vec<A>, b: Vec<B>) -> Result<Vec<(A, B)>, WireError> {
    if a.len() != b.len() {
        return Err(WireError::invalid(field, format!("has columns of {} and {} rows", a.len(), b.len())));
    }
    Ok(a.into_iter().zip(b).collect())
}

impl From<ConstraintTable> for v1::ConstraintTable {
    fn from(table: ConstraintTable) -> Self {
        let ConstraintTable { id, runs, classes, next } = table;
        let (first, class) = runs.into_iter().map(|(token, class)| (token.0, class)).unzip();
        Self { id: id.0, first, class, classes, next }
    }
}

impl TryFrom<v1::ConstraintTable> for ConstraintTable {
    type Error = WireError;

    fn try_from(table: v1::ConstraintTable) -> Result<Self, WireError> {
        let v1::ConstraintTable { id, first, class, classes, next } = table;
        let runs = rows("runs", first, class)?.into_iter().map(|(token, class)| (TokenId(token), class)).collect();
        Ok(Self { id: TableId(id), runs, classes, next })
    }
}

impl From<Admission> for v1::Admission {
    fn from(admission: Admission) -> Self {
        let Admission { seq, sampling, bias, constraint, cached, history } = admission;
        let (bias_tokens, bias_values) = bias.into_iter().map(|(token, bias)| (token.0, bias)).unzip();
        let constraint =
            constraint.map(|ConstraintStart { table, state }| v1::ConstraintStart { table: table.0, state });
        let History { prompt, generated } = history;
        Self {
            seq: seq.0,
            sampling: Some(sampling.into()),
            bias_tokens,
            bias_values,
            constraint,
            cached,
            prompt: ids(prompt),
            generated: ids(generated),
        }
    }
}

impl TryFrom<v1::Admission> for Admission {
    type Error = WireError;

    fn try_from(admission: v1::Admission) -> Result<Self, WireError> {
        let v1::Admission { seq, sampling, bias_tokens, bias_values, constraint, cached, prompt, generated } =
            admission;
        let bias = rows("bias", short("bias", bias_tokens, Self::BIAS_MAX)?, bias_values)?;
        let start = |start: v1::ConstraintStart| ConstraintStart { table: TableId(start.table), state: start.state };
        Ok(Self {
            seq: SeqId(seq),
            sampling: present("sampling", sampling)?.try_into()?,
            bias: bias.into_iter().map(|(token, bias)| (TokenId(token), bias)).collect(),
            constraint: constraint.map(start),
            cached,
            history: History { prompt: token_ids(prompt), generated: token_ids(generated) },
        })
    }
}

fn ids(tokens: Vec<TokenId>) -> Vec<u32> {
    tokens.into_iter().map(|token| token.0).collect()
}

fn token_ids(ids: Vec<u32>) -> Vec<TokenId> {
    ids.into_iter().map(TokenId).collect()
}

impl From<Rows> for v1::Rows {
    fn from(rows: Rows) -> Self {
        use v1::rows::{Start as WireStart, Tokens as WireTokens};
        let Rows { seq, start, tokens, outputs, grants } = rows;
        let start = match start {
            Start::At(position) => WireStart::At(position.0),
            Start::AfterPrevious => WireStart::AfterPrevious(v1::Unit {}),
        };
        let tokens = match tokens {
            Tokens::Given(tokens) => WireTokens::Given(v1::TokenIds { ids: ids(tokens) }),
            Tokens::Previous => WireTokens::Previous(v1::Unit {}),
            Tokens::Draft(guesses) => WireTokens::Draft(v1::TokenIds { ids: ids(guesses) }),
        };
        Self {
            seq: seq.0,
            start: Some(start),
            tokens: Some(tokens),
            outputs: v1::Outputs::from(outputs).into(),
            grants: grants.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Rows> for Rows {
    type Error = WireError;

    fn try_from(rows: v1::Rows) -> Result<Self, WireError> {
        use v1::rows::{Start as WireStart, Tokens as WireTokens};
        let start = match present("start", rows.start)? {
            WireStart::At(position) => Start::At(Position(position)),
            WireStart::AfterPrevious(v1::Unit {}) => Start::AfterPrevious,
        };
        let tokens = match present("tokens", rows.tokens)? {
            WireTokens::Given(tokens) => Tokens::Given(token_ids(tokens.ids)),
            WireTokens::Previous(v1::Unit {}) => Tokens::Previous,
            WireTokens::Draft(guesses) => Tokens::Draft(token_ids(guesses.ids)),
        };
        Ok(Self { seq: SeqId(rows.seq), start, tokens, outputs: outputs(rows.outputs)?, grants: all(rows.grants)? })
    }
}

impl From<StepPlan> for v1::StepPlan {
    fn from(plan: StepPlan) -> Self {
        let StepPlan { header, tables, release, admit, kv_ops, rows } = plan;
        let StepHeader { fence, deadline_ms, applied, rows_of_rank } = header;
        Self {
            header: Some(v1::StepHeader { fence: Some(fence.into()), deadline_ms, applied: applied.0, rows_of_rank }),
            tables: tables.into_iter().map(Into::into).collect(),
            release: release.into_iter().map(|seq| seq.0).collect(),
            admit: admit.into_iter().map(Into::into).collect(),
            kv_ops: kv_ops.into_iter().map(Into::into).collect(),
            rows: rows.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::StepPlan> for StepPlan {
    type Error = WireError;

    fn try_from(plan: v1::StepPlan) -> Result<Self, WireError> {
        let header = present("header", plan.header)?;
        Ok(Self {
            header: StepHeader {
                fence: fence(header.fence)?,
                deadline_ms: header.deadline_ms,
                applied: StepId(header.applied),
                rows_of_rank: short("rows_of_rank", header.rows_of_rank, Layout::RANKS_MAX as usize)?,
            },
            tables: all(plan.tables)?,
            release: plan.release.into_iter().map(SeqId).collect(),
            admit: all(plan.admit)?,
            kv_ops: all(plan.kv_ops)?,
            rows: all(plan.rows)?,
        })
    }
}

impl From<TokenLogprobs> for v1::TokenLogprobs {
    fn from(logprobs: TokenLogprobs) -> Self {
        let (top_tokens, top_logprobs) = logprobs.top.into_iter().map(|(token, logprob)| (token.0, logprob)).unzip();
        Self { logprob: logprobs.logprob, top_tokens, top_logprobs }
    }
}

impl TryFrom<v1::TokenLogprobs> for TokenLogprobs {
    type Error = WireError;

    fn try_from(logprobs: v1::TokenLogprobs) -> Result<Self, WireError> {
        let v1::TokenLogprobs { logprob, top_tokens, top_logprobs } = logprobs;
        let top = rows("top", short("top", top_tokens, Sampling::LOGPROBS_MAX as usize)?, top_logprobs)?;
        Ok(Self { logprob, top: top.into_iter().map(|(token, logprob)| (TokenId(token), logprob)).collect() })
    }
}

impl From<RowsResult> for v1::RowsResult {
    fn from(rows: RowsResult) -> Self {
        let RowsResult { seq, position, tokens, logprobs, logits } = rows;
        let logits = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        let logprobs = logprobs.into_iter().map(Into::into).collect();
        Self { seq: seq.0, position: position.0, tokens: ids(tokens), logits, logprobs }
    }
}

impl TryFrom<v1::RowsResult> for RowsResult {
    type Error = WireError;

    fn try_from(rows: v1::RowsResult) -> Result<Self, WireError> {
        let (numbers, rest) = rows.logits.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(WireError::invalid("logits", format!("has {} bytes, not a multiple of 4", rows.logits.len())));
        }
        Ok(Self {
            seq: SeqId(rows.seq),
            position: Position(rows.position),
            tokens: token_ids(rows.tokens),
            logprobs: all(rows.logprobs)?,
            logits: numbers.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        })
    }
}

impl From<PhaseTimes> for v1::PhaseTimes {
    fn from(times: PhaseTimes) -> Self {
        Self {
            input: times.get(Phase::Input),
            attention: times.get(Phase::Attention),
            router: times.get(Phase::Router),
            dispatch: times.get(Phase::Dispatch),
            experts: times.get(Phase::Experts),
            combine: times.get(Phase::Combine),
            unembed: times.get(Phase::Unembed),
            sample: times.get(Phase::Sample),
        }
    }
}

impl From<v1::PhaseTimes> for PhaseTimes {
    fn from(times: v1::PhaseTimes) -> Self {
        Self(Phase::ALL.map(|phase| match phase {
            Phase::Input => times.input,
            Phase::Attention => times.attention,
            Phase::Router => times.router,
            Phase::Dispatch => times.dispatch,
            Phase::Experts => times.experts,
            Phase::Combine => times.combine,
            Phase::Unembed => times.unembed,
            Phase::Sample => times.sample,
        }))
    }
}

impl From<ExchangeCounters> for v1::ExchangeCounters {
    fn from(counters: ExchangeCounters) -> Self {
        let ExchangeCounters { dispatch_rows, combine_rows, bytes_sent, bytes_received } = counters;
        Self { dispatch_rows, combine_rows, bytes_sent, bytes_received }
    }
}

impl From<v1::ExchangeCounters> for ExchangeCounters {
    fn from(counters: v1::ExchangeCounters) -> Self {
        let v1::ExchangeCounters { dispatch_rows, combine_rows, bytes_sent, bytes_received } = counters;
        Self { dispatch_rows, combine_rows, bytes_sent, bytes_received }
    }
}

/// A rank of some cell.
pub(crate) fn rank(field: &'static str, rank: u32) -> Result<Rank, WireError> {
    at_most(field, rank, Layout::RANKS_MAX - 1).map(Rank)
}

/// A set of ranks of some cell.
pub(crate) fn ranks(field: &'static str, ranks: Vec<u32>) -> Result<Vec<Rank>, WireError> {
    short(field, ranks, Layout::RANKS_MAX as usize)?.into_iter().map(|r| rank(field, r)).collect()
}

impl From<StepResult> for v1::StepResult {
    fn from(result: StepResult) -> Self {
        let StepResult { fence, rank, rows, phases, exchange } = result;
        Self {
            fence: Some(fence.into()),
            rank: rank.0,
            rows: rows.into_iter().map(Into::into).collect(),
            phases: Some(phases.into()),
            exchange: Some(exchange.into()),
        }
    }
}

impl TryFrom<v1::StepResult> for StepResult {
    type Error = WireError;

    fn try_from(result: v1::StepResult) -> Result<Self, WireError> {
        Ok(Self {
            fence: fence(result.fence)?,
            rank: rank("rank", result.rank)?,
            rows: all(result.rows)?,
            phases: present("phases", result.phases)?.into(),
            exchange: present("exchange", result.exchange)?.into(),
        })
    }
}

impl From<StepFailure> for v1::StepFailure {
    fn from(failure: StepFailure) -> Self {
        let StepFailure { fence, message, blamed } = failure;
        Self {
            fence: Some(fence.into()),
            message: cut(message, TEXT_BYTES_MAX),
            blamed: blamed.into_iter().map(|r| r.0).collect(),
        }
    }
}

impl TryFrom<v1::StepFailure> for StepFailure {
    type Error = WireError;

    fn try_from(failure: v1::StepFailure) -> Result<Self, WireError> {
        Ok(Self {
            fence: fence(failure.fence)?,
            message: brief("message", failure.message, TEXT_BYTES_MAX)?,
            blamed: ranks("blamed", failure.blamed)?,
        })
    }
}

impl From<StepReply> for v1::StepReply {
    fn from(reply: StepReply) -> Self {
        let reply = match reply {
            Ok(result) => v1::step_reply::Reply::Result(result.into()),
            Err(failure) => v1::step_reply::Reply::Failure(failure.into()),
        };
        Self { reply: Some(reply) }
    }
}

impl TryFrom<v1::StepReply> for StepReply {
    type Error = WireError;

    fn try_from(reply: v1::StepReply) -> Result<Self, WireError> {
        Ok(match present("reply", reply.reply)? {
            v1::step_reply::Reply::Result(result) => Ok(result.try_into()?),
            v1::step_reply::Reply::Failure(failure) => Err(failure.try_into()?),
        })
    }
}
