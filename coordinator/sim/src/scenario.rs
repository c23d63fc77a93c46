//! A small world, drawn from a seed: a cell, what is asked of it, and what goes wrong.

use phalanx_planner::{Class, EngineConfig, Request, Want};
use phalanx_proto::{ConstraintStart, ConstraintTable, Limits, Rank, Sampling, SeqId, TableId, TokenId};

use crate::clock::{MILLISECOND, Nanos};
use crate::random::Random;
use crate::truth::Truth;

/// What goes wrong, or changes, at a moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// The stream of a rank breaks for so long; what is on its way is lost.
    Break(Rank, Nanos),
    /// What a rank has not answered is sent again.
    Repeat(Rank),
    /// A result that answers nothing comes from a rank.
    Forged(Rank),
    /// A rank takes so many times as long for the next steps.
    Slow(Rank, u32),
    /// Rows of one sequence in one step from now on.
    ChunkMax(u32),
    /// A request that lives is submitted again.
    Twice,
}

/// A request and what its client does.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrival {
    /// When it comes.
    pub at: Nanos,
    /// When its client goes, if it does not wait.
    pub cancelled: Option<Nanos>,
    /// The request.
    pub request: Request,
}

/// A cell and all that happens to it.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Decides what is left to chance while it runs.
    pub seed: u64,
    /// The engine's.
    pub config: EngineConfig,
    /// Nanoseconds that a message takes at least.
    pub delay: Nanos,
    /// Up to so many more.
    pub jitter: Nanos,
    /// Requests, in any order.
    pub arrivals: Vec<Arrival>,
    /// Faults, in any order.
    pub faults: Vec<(Nanos, Fault)>,
}

/// Arrivals and faults end here.
const QUIET: Nanos = 80 * MILLISECOND;

impl Scenario {
    /// The world of a seed.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let random = &mut Random::new(seed);
        let config = config(random);
        let arrivals = arrivals(random, &config);
        let rate = random.pick(&[0, 0, 2, 6, 20]);
        let faults = (0..random.between(0, rate)).map(|_| (random.below(QUIET), fault(random, &config))).collect();
        let (delay, jitter) = (random.below(3 * MILLISECOND), random.pick(&[0, 1, 5]) * MILLISECOND);
        Self { seed, config, delay, jitter, arrivals, faults }
    }
}

fn config(random: &mut Random) -> EngineConfig {
    // A few worlds have long prompts, of which windows are kept here and there.
    let long = random.chance(0.005);
    let block_size = if long { 16 } else { random.pick(&[2, 4, 8, 16]) };
    let window = random.between(1, 3 * block_size);
    let seqs_max = random.between(1, 6);
    let step_rows_max = if long { random.between(100, 400) } else { random.between(1, 40) };
    // Room for one whole context and little more, so that sequences are sent back.
    let context_blocks = if long { 300 } else { random.pick(&[2, 3, 4, 6, 10]) };
    let full_blocks = context_blocks + random.between(0, context_blocks);
    let live = seqs_max * (window.div_ceil(block_size) + 2) + step_rows_max.div_ceil(block_size);
    let limits = Limits {
        seqs_max,
        step_rows_max,
        block_size,
        full_blocks,
        window_blocks: live + full_blocks / 4,
        context: context_blocks * block_size - random.between(0, block_size - 1),
    };
    let vocab = random.pick(&[7, 32, 97]);
    EngineConfig {
        queue_max: if random.chance(0.1) { 2 } else { 1000 },
        queue_tokens_max: if random.chance(0.1) { 50 } else { 1 << 20 },
        depth: random.between(1, 4),
        prefix_cache: random.chance(0.7),
        numerics: random.next(),
        tables: (0..random.between(0, 2)).map(|id| table(random, TableId(id), vocab)).collect(),
        chunk_max: random.between(if long { 50 } else { 1 }, step_rows_max),
        deadline_ms: random.between(1, 1000),
        checked: true,
        ..EngineConfig::of(window, vocab, limits, random.between(1, 4))
    }
}

/// Whether prompts may be long.
const fn is_long(config: &EngineConfig) -> bool {
    config.limits.context > 1000
}

/// A small automaton over two classes of tokens in which every state has a way on.
fn table(random: &mut Random, id: TableId, vocab: u32) -> ConstraintTable {
    let states = random.between(1, 4);
    let to = |random: &mut Random| random.below(u64::from(states)) as u32;
    let mut next = Vec::new();
    for _ in 0..states {
        let (first, second) = (to(random), to(random));
        next.extend(match random.below(3) {
            0 => [ConstraintTable::REFUSED, second],
            1 => [first, ConstraintTable::REFUSED],
            _ => [first, second],
        });
    }
    let middle = random.between(1, vocab - 1);
    ConstraintTable { id, runs: vec![(TokenId(0), 0), (TokenId(middle), 1)], classes: 2, next }
}

fn arrivals(random: &mut Random, config: &EngineConfig) -> Vec<Arrival> {
    let prefix = |random: &mut Random| {
        let len = random.between(0, config.limits.context);
        (0..len).map(|_| token(random, config)).collect::<Vec<TokenId>>()
    };
    let prefixes: Vec<Vec<TokenId>> = (0..random.between(1, 3)).map(|_| prefix(random)).collect();
    let last = random.pick(&[1, 20, 80]) * MILLISECOND;
    let batch = random.pick(&[0.0, 0.3, 0.8]);
    let cancels = random.pick(&[0.0, 0.1, 0.5]);
    let mut arrivals: Vec<Arrival> = Vec::new();
    let most = if is_long(config) { 12 } else { random.pick(&[6, 24, 24, 60]) };
    for seq in 0..u64::from(random.between(1, most)) {
        let prompt = prompt(random, config, &prefixes, &arrivals);
        let at = random.below(last);
        let request = request(random, config, SeqId(seq), prompt, batch);
        let cancelled = random.chance(cancels).then(|| at + random.below(QUIET));
        arrivals.push(Arrival { at, cancelled, request });
    }
    arrivals
}

fn token(random: &mut Random, config: &EngineConfig) -> TokenId {
    TokenId(random.below(u64::from(config.vocab)) as u32)
}

/// Shared beginnings, next turns of conversations, the same again, and prompts of their own.
fn prompt(random: &mut Random, config: &EngineConfig, prefixes: &[Vec<TokenId>], arrivals: &[Arrival]) -> Vec<TokenId> {
    let mut prompt = match random.below(4) {
        0 => Vec::new(),
        1 | 2 => prefixes[random.below(prefixes.len() as u64) as usize].clone(),
        _ if arrivals.is_empty() => Vec::new(),
        _ => {
            let before = &arrivals[random.below(arrivals.len() as u64) as usize].request;
            let answer = Truth::of(before, &config.tables, config.vocab).tokens;
            before.prompt.iter().copied().chain(answer.into_iter().map(|(token, _)| token)).collect()
        }
    };
    if random.chance(0.3) {
        prompt.truncate(random.below(prompt.len() as u64 + 1) as usize);
    }
    let own = random.between(0, config.limits.block_size);
    prompt.extend((0..own).map(|_| token(random, config)));
    // Most prompts leave room for an answer; few are refused.
    if !random.chance(0.03) {
        prompt.truncate((config.limits.context - 1) as usize);
        if prompt.is_empty() {
            prompt.push(token(random, config));
        }
    }
    prompt
}

fn request(random: &mut Random, config: &EngineConfig, seq: SeqId, prompt: Vec<TokenId>, batch: f64) -> Request {
    let room = config.limits.context.saturating_sub(prompt.len() as u32);
    let most = if is_long(config) { room.min(20) } else { room };
    let mut request = Request::greedy(seq, prompt, random.between(0, most));
    if random.chance(0.02) {
        request.max_tokens = room + 1;
    }
    request.class = if random.chance(batch) { Class::Batch } else { Class::Interactive };
    request.salt = random.pick(&[0, 0, 0, 1]);
    if random.chance(0.3) {
        request.stop_tokens = vec![token(random, config)];
    }
    if random.chance(0.1) {
        request.want = Want::Logits;
    }
    if random.chance(0.5) {
        request.sampling = sampling(random);
    }
    if random.chance(0.1) {
        request.bias = vec![(token(random, config), 1.5)];
    }
    if !config.tables.is_empty() && random.chance(0.3) {
        let table = &config.tables[random.below(config.tables.len() as u64) as usize];
        let state = random.below(table.states() as u64) as u32;
        request.constraint = Some(ConstraintStart { table: table.id, state });
    }
    request
}

fn sampling(random: &mut Random) -> Sampling {
    Sampling {
        temperature: 1.0,
        seed: random.next(),
        choice: random.between(0, 3),
        presence_penalty: random.pick(&[0.0, 0.0, 0.5]),
        frequency_penalty: random.pick(&[0.0, 0.0, 0.5]),
        repetition_penalty: random.pick(&[1.0, 1.0, 1.5]),
        logprobs: random.pick(&[None, None, Some(0), Some(3)]),
        ..Sampling::GREEDY
    }
}

fn fault(random: &mut Random, config: &EngineConfig) -> Fault {
    let rank = Rank(random.below(u64::from(config.ranks)) as u32);
    match random.below(10) {
        0..3 => Fault::Break(rank, random.below(20 * MILLISECOND)),
        3..5 => Fault::Repeat(rank),
        5 | 6 => Fault::Forged(rank),
        7 => Fault::Slow(rank, random.between(2, 20)),
        8 if is_long(config) => Fault::ChunkMax(config.limits.step_rows_max / 2),
        8 => Fault::ChunkMax(random.between(0, 2 * config.limits.step_rows_max)),
        _ => Fault::Twice,
    }
}
