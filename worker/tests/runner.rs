//! The runner over a small checkpoint: what a sequence gives does not depend on how its rows come to the rank.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../tests/support/paths.rs"]
mod paths;

use phalanx_kernels::cpu::Cpu;
use phalanx_model::packed::Stored;
use phalanx_model::{Checkpoint, GptOss};
use phalanx_proto::{
    Admission, BlockGrant, BlockId, ConstraintStart, ConstraintTable, DenseType, Fence, History, Layout, Limits,
    Outputs, Placement, PlanError, Pool, Position, Precision, Rank, Rows, RowsResult, Sampling, SeqId, Start,
    StepHeader, StepId, StepPlan, StepResult, TableId, TokenId, TokenLogprobs, Tokens,
};
use phalanx_worker::collectives::local::{self, Local};
use phalanx_worker::collectives::nccl::ExchangeRequest;
use phalanx_worker::constraints::{ConstraintFailure, Refused};
use phalanx_worker::device::{Device, DriverGpus, Processor};
use phalanx_worker::runner::{Runner, STEPS_IN_FLIGHT, StepError};

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// Sequences at once, each with blocks of its own.
const PLACES: u32 = 4;
const CONTEXT: u32 = 128;
const STRETCHES: u32 = CONTEXT / Limits::BLOCK_SIZE;
const ROWS_MAX: u32 = 64;
const LIMITS: Limits = Limits {
    seqs_max: PLACES,
    step_rows_max: ROWS_MAX,
    block_size: Limits::BLOCK_SIZE,
    full_blocks: PLACES * STRETCHES,
    window_blocks: PLACES * STRETCHES,
    context: CONTEXT,
};

fn checkpoint() -> Checkpoint {
    Checkpoint::open(&paths::fixture("tiny-a")).unwrap()
}

/// A rank alone in its cell, and the steps it has done.
struct Bench {
    runner: Runner<Cpu, Local>,
    fence: Fence,
    next_seq: u64,
    /// The plans of the last steps with their results.
    recent: Vec<(StepPlan, StepResult)>,
    /// All plans with their results.
    log: Vec<(StepPlan, StepResult)>,
}

impl Bench {
    fn new(checkpoint: &Checkpoint) -> Self {
        let layout = Layout::new(1, 0).unwrap();
        let config = checkpoint.config();
        let placement = Placement::contiguous(config.layers.len() as u32, config.experts, layout);
        let backend = Device {
            processor: Processor::Cpu,
            precision: Precision::Exact,
            dense: DenseType::Bf16,
            threads: 1,
            pin: None,
            weight_cache: false,
            isa: None,
            gpus: &DriverGpus,
            exchange: ExchangeRequest::Auto,
        }
        .cpu()
        .unwrap();
        let model =
            GptOss::load(backend, Stored { checkpoint, packed: None }, &placement, Rank(0), 1, &LIMITS, &mut |_, _| ())
                .unwrap();
        let runner = Runner::new(model, local::group(1).remove(0), LIMITS, Fence::default());
        Self { runner, fence: Fence::default(), next_seq: 0, recent: Vec::new(), log: Vec::new() }
    }

    fn seq(&mut self) -> SeqId {
        self.next_seq += 1;
        SeqId(self.next_seq)
    }

    /// The plan as the next step.
    fn next(&self, plan: StepPlan) -> StepPlan {
        let fence = self.fence.next();
        let rows = plan.row_count() as u32;
        let applied = StepId(fence.step.0.saturating_sub(5));
        StepPlan { header: StepHeader { fence, deadline_ms: 60_000, applied, rows_of_rank: vec![rows] }, ..plan }
    }

    fn run(&mut self, plan: StepPlan) -> Result<StepResult, StepError> {
        let plan = self.next(plan);
        let result = self.runner.run(&plan, &())?;
        self.fence = plan.header.fence;
        self.log.push((plan.clone(), result.clone()));
        self.recent.push((plan, result.clone()));
        if self.recent.len() > 5 {
            self.recent.remove(0);
        }
        Ok(result)
    }

    /// Sends a plan of the last steps again, as it was or as an empty one.
    fn repeat(&mut self, rng: &mut Rng) {
        let Some((plan, result)) = self.recent.get(rng.below(5)) else { return };
        let plan =
            if rng.one_in(2) { plan.clone() } else { StepPlan { header: plan.header.clone(), ..StepPlan::default() } };
        assert_eq!(self.runner.run(&plan, &()).as_ref(), Ok(result));
    }
}

/// What a sequence is asked for.
#[derive(Clone, Debug)]
struct Request {
    prompt: Vec<TokenId>,
    sampling: Sampling,
    bias: Vec<(TokenId, f32)>,
    constraint: Option<ConstraintStart>,
    tokens: usize,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Given {
    tokens: Vec<TokenId>,
    logprobs: Vec<TokenLogprobs>,
}

/// A request on its way.
struct Live<'a> {
    request: &'a Request,
    place: u32,
    given: Given,
    /// Positions whose keys and values are in the blocks of its place.
    computed: u32,
    /// Its sequence, if it is admitted.
    seq: Option<SeqId>,
    /// Stretches given to that sequence.
    granted: u32,
    /// Whether that sequence has sampled.
    sampled: bool,
}

impl Live<'_> {
    fn done(&self) -> bool {
        self.given.tokens.len() >= self.request.tokens
    }

    fn admission(&self, seq: SeqId, cached: u32) -> Admission {
        let Request { prompt, sampling, bias, constraint, .. } = self.request.clone();
        let needed = sampling.looks_back() || constraint.is_some();
        let history = History { prompt, generated: self.given.tokens.clone() };
        let history = if needed { history } else { History::default() };
        Admission { seq, sampling, bias, constraint, cached, history }
    }

    fn rows(&mut self, start: Start, from: u32, tokens: Tokens, outputs: Outputs) -> Rows {
        let end = (from + tokens.rows() as u32).div_ceil(Limits::BLOCK_SIZE);
        let grants = (self.granted..end).flat_map(|index| {
            let block = BlockId(self.place * STRETCHES + index);
            [Pool::Full, Pool::Window].map(|pool| BlockGrant { pool, index, block })
        });
        let grants = grants.collect();
        self.granted = self.granted.max(end);
        Rows { seq: self.seq.unwrap(), start, tokens, outputs, grants }
    }
}

/// The one way: the whole prompt, then token after token.
fn alone(checkpoint: &Checkpoint, tables: &[ConstraintTable], request: &Request) -> Given {
    let mut bench = Bench::new(checkpoint);
    generate(&mut bench, tables, std::slice::from_ref(request), None).remove(0)
}

/// Runs the requests together: plainly, or with every liberty that a coordinator has. `hints` are what they will give.
fn generate(
    bench: &mut Bench,
    tables: &[ConstraintTable],
    requests: &[Request],
    mut chaos: Option<(&mut Rng, &[Given])>,
) -> Vec<Given> {
    let mut live: Vec<Live<'_>> = (0..)
        .zip(requests)
        .map(|(place, request)| {
            let given = Given::default();
            Live { request, place, given, computed: 0, seq: None, granted: 0, sampled: false }
        })
        .collect();
    bench.run(StepPlan { tables: tables.to_vec(), ..StepPlan::default() }).unwrap();
    while !live.iter().all(Live::done) {
        let mut plan = StepPlan::default();
        let mut left = ROWS_MAX as usize;
        for at in 0..live.len() {
            let sequence = &mut live[at];
            if let (Some(seq), true) = (sequence.seq, sequence.done()) {
                plan.release.push(seq);
                sequence.seq = None;
            }
            if sequence.done() {
                continue;
            }
            let hints = chaos.as_ref().map(|(_, hints)| &hints[at].tokens[..]);
            let mut rng = chaos.as_mut().map(|(rng, _)| &mut **rng);
            let mut one_in = |n: usize| rng.as_mut().is_some_and(|rng| rng.one_in(n));
            if let Some(seq) = sequence.seq.filter(|_| one_in(9)) {
                plan.release.push(seq);
                sequence.seq = None;
            }
            if one_in(4) {
                continue;
            }
            let mut below = |n: usize| chaos.as_mut().map_or(0, |(rng, _)| rng.below(n));
            if sequence.seq.is_none() {
                sequence.seq = Some(bench.seq());
                (sequence.granted, sequence.sampled) = (0, false);
                let cached = below(sequence.computed as usize + 1) as u32;
                plan.admit.push(sequence.admission(sequence.seq.unwrap(), cached));
                sequence.computed = cached;
            }
            let all: Vec<TokenId> = sequence.request.prompt.iter().chain(&sequence.given.tokens).copied().collect();
            let length = all.len() as u32;
            let next = length - 1 == sequence.computed && sequence.sampled;
            let draft = next && hints.is_some() && below(3) == 0;
            let rows = if draft && left >= 4 && sequence.given.tokens.len() + 4 < sequence.request.tokens {
                let from = sequence.given.tokens.len();
                let guess = |token: &TokenId| if below(3) == 0 { TokenId(below(300) as u32) } else { *token };
                let guesses = hints.unwrap()[from..from + 3].iter().map(guess).collect();
                sequence.rows(Start::AfterPrevious, length - 1, Tokens::Draft(guesses), Outputs::Verify)
            } else if next && below(4) != 1 && left > 0 {
                sequence.rows(Start::AfterPrevious, length - 1, Tokens::Previous, Outputs::Sample)
            } else {
                // Sometimes what is computed is computed again.
                let again = if below(5) == 1 { below(20) as u32 } else { 0 };
                let from = sequence.computed.min(length - 1).saturating_sub(again);
                let rest = (length - from) as usize;
                let count = rest.min(left).min(if below(2) == 1 { 1 + below(12) } else { rest });
                if count == 0 {
                    continue;
                }
                let end = from as usize + count;
                let outputs = if end == all.len() { Outputs::Sample } else { Outputs::None };
                let tokens = Tokens::Given(all[from as usize..end].to_vec());
                sequence.rows(Start::At(Position(from)), from, tokens, outputs)
            };
            left -= rows.tokens.rows();
            if rows.outputs == Outputs::None {
                sequence.computed = match rows.start {
                    Start::At(from) => from.0 + rows.tokens.rows() as u32,
                    Start::AfterPrevious => unreachable!(),
                };
            }
            plan.rows.push(rows);
        }
        let result = bench.run(plan).unwrap();
        for rows in result.rows {
            let sequence = live.iter_mut().find(|live| live.seq == Some(rows.seq)).unwrap();
            let RowsResult { position, tokens, logprobs, logits, .. } = rows;
            let so_far = sequence.request.prompt.len() + sequence.given.tokens.len();
            assert_eq!((position, logits.len()), (Position(so_far as u32), 0));
            sequence.given.tokens.extend(tokens);
            sequence.given.logprobs.extend(logprobs);
            let so_far = sequence.request.prompt.len() + sequence.given.tokens.len();
            (sequence.computed, sequence.sampled) = (so_far as u32 - 1, true);
        }
        if let Some((rng, _)) = &mut chaos {
            bench.repeat(rng);
        }
    }
    live.into_iter().map(|live| live.given).collect()
}

/// A random automaton of 1 to 6 states over 2 to 7 classes, in which about half of all ways are refused.
fn random_table(id: u32, vocab: u32, rng: &mut Rng) -> ConstraintTable {
    loop {
        let (states, classes) = (1 + rng.below(6), 2 + rng.below(6));
        let mut first = 0;
        let mut runs = Vec::new();
        while first < vocab {
            runs.push((TokenId(first), rng.below(classes) as u32));
            first += 1 + rng.below(40) as u32;
        }
        let mut way = || if rng.one_in(2) { ConstraintTable::REFUSED } else { rng.below(states) as u32 };
        let next = (0..states * classes).map(|_| way()).collect();
        let table = ConstraintTable { id: TableId(id), runs, classes: classes as u32, next };
        if table.check(vocab).is_ok() {
            return table;
        }
    }
}

fn random_request(vocab: u32, tables: &[ConstraintTable], rng: &mut Rng) -> Request {
    let prompt = (0..1 + rng.below(40)).map(|_| TokenId(rng.below(vocab as usize) as u32)).collect();
    let mut some = |value: f32, else_: f32| if rng.one_in(2) { value } else { else_ };
    let sampling = Sampling {
        temperature: some(2.0, 0.0),
        presence_penalty: some(0.7, 0.0),
        frequency_penalty: some(0.4, 0.0),
        repetition_penalty: some(1.3, 1.0),
        top_p: some(0.9, 1.0),
        min_p: some(0.01, 0.0),
        top_k: 0,
        seed: rng.next(),
        choice: rng.below(3) as u32,
        logprobs: [None, Some(0), Some(3)][rng.below(3)],
    };
    let sampling = Sampling { top_k: if rng.one_in(3) { 20 } else { 0 }, ..sampling };
    let mut bias: Vec<(TokenId, f32)> = Vec::new();
    if rng.one_in(2) {
        let mut token = 0;
        while token < vocab {
            bias.push((TokenId(token), [-100.0, -1.5, 0.5, 2.0][rng.below(4)]));
            token += 1 + rng.below(20) as u32;
        }
    }
    let constraint = rng.one_in(2).then(|| {
        let table = &tables[rng.below(tables.len())];
        ConstraintStart { table: table.id, state: rng.below(table.states()) as u32 }
    });
    Request { prompt, sampling, bias, constraint, tokens: 24 }
}

/// The state after `tokens`; panics if one of them is refused.
fn obey(tables: &[ConstraintTable], start: ConstraintStart, tokens: &[TokenId]) {
    let table = tables.iter().find(|table| table.id == start.table).unwrap();
    let step = |state, token: &TokenId| {
        table.step(state, table.class(*token).unwrap()).unwrap_or_else(|| panic!("{token} in state {state}"))
    };
    tokens.iter().fold(start.state, step);
}

#[test]
fn a_sequence_gives_the_same_however_its_rows_come() {
    let checkpoint = checkpoint();
    let vocab = checkpoint.config().vocab;
    let (mut greedy, mut constrained) = (0, 0);
    for seed in 0..24 {
        // Seen when it fails.
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let tables: Vec<_> = (0..3).map(|id| random_table(id, vocab, &mut rng)).collect();
        let count = 1 + rng.below(PLACES as usize);
        let requests: Vec<_> = (0..count).map(|_| random_request(vocab, &tables, &mut rng)).collect();
        let expected: Vec<_> = requests.iter().map(|request| alone(&checkpoint, &tables, request)).collect();
        for (request, given) in requests.iter().zip(&expected) {
            assert_eq!(given.tokens.len(), 24);
            assert_eq!(given.logprobs.len(), if request.sampling.logprobs.is_some() { 24 } else { 0 });
            if let Some(start) = request.constraint {
                obey(&tables, start, &given.tokens);
                constrained += 1;
            }
            greedy += usize::from(request.sampling.temperature == 0.0);
        }
        for _ in 0..3 {
            let mut bench = Bench::new(&checkpoint);
            let given = generate(&mut bench, &tables, &requests, Some((&mut rng, &expected)));
            for ((request, expected), given) in requests.iter().zip(&expected).zip(&given) {
                assert_eq!(expected.tokens, given.tokens[..24], "{request:?}");
                assert_eq!(expected.logprobs, given.logprobs[..expected.logprobs.len()], "{request:?}");
            }
        }
    }
    assert!(greedy > 5 && constrained > 5, "{greedy} greedy, {constrained} constrained");
}

/// Steps begin before those before them are finished: whatever leaves, comes back, looks back, is constrained or guessed,
/// each gives what it gives alone.
#[test]
fn steps_that_overlap_give_what_they_give_one_by_one() {
    let checkpoint = checkpoint();
    let vocab = checkpoint.config().vocab;
    let mut most = 0;
    for seed in 100..112 {
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let tables: Vec<_> = (0..3).map(|id| random_table(id, vocab, &mut rng)).collect();
        let mut requests: Vec<_> = (0..PLACES).map(|_| random_request(vocab, &tables, &mut rng)).collect();
        if seed % 2 == 0 {
            // Nothing that a step would have to wait for.
            for Request { sampling, constraint, .. } in &mut requests {
                *sampling = Sampling { temperature: sampling.temperature, seed: sampling.seed, ..Sampling::GREEDY };
                *constraint = None;
            }
        }
        let expected: Vec<_> = requests.iter().map(|request| alone(&checkpoint, &tables, request)).collect();
        let mut bench = Bench::new(&checkpoint);
        generate(&mut bench, &tables, &requests, Some((&mut rng, &expected)));

        let mut runner = Bench::new(&checkpoint).runner;
        let mut under_way: Vec<&(StepPlan, StepResult)> = Vec::new();
        for step in &bench.log {
            runner.begin(&step.0, &()).unwrap();
            under_way.push(step);
            most = most.max(under_way.len());
            if rng.one_in(5) {
                // Sent again, while it may be under way.
                runner.begin(&under_way[rng.below(under_way.len())].0, &()).unwrap();
            }
            while under_way.len() > rng.below(3) {
                let (plan, expected) = under_way.remove(0);
                assert_eq!(runner.finish(plan.header.fence).unwrap().rows, expected.rows);
            }
        }
        assert!(under_way.is_empty() || runner.is_done());
    }
    assert_eq!(most, 3);
}

/// Logits of every position of `tokens`, `[n, V]`.
fn logits(checkpoint: &Checkpoint, tokens: &[TokenId]) -> Vec<f32> {
    let mut bench = Bench::new(checkpoint);
    let request =
        Request { prompt: tokens.to_vec(), sampling: Sampling::GREEDY, bias: Vec::new(), constraint: None, tokens: 1 };
    let seq = bench.seq();
    let mut live = live(&request, seq);
    let admit = vec![live.admission(seq, 0)];
    let rows = live.rows(Start::At(Position(0)), 0, Tokens::Given(tokens.to_vec()), Outputs::AllLogits);
    bench.run(StepPlan { admit, rows: vec![rows], ..StepPlan::default() }).unwrap().rows.remove(0).logits
}

/// The most likely token after each position, computed as the penalties are defined, from the logits alone.
#[test]
fn penalties_biases_and_logprobs_are_what_they_are_defined_to_be() {
    let checkpoint = checkpoint();
    let vocab = checkpoint.config().vocab as usize;
    let mut rng = Rng(3);
    let mut changed = 0;
    for _ in 0..8 {
        let mut request = random_request(vocab as u32, &[random_table(0, vocab as u32, &mut rng)], &mut rng);
        request.constraint = None;
        request.sampling = Sampling {
            presence_penalty: 1.0,
            frequency_penalty: 0.5,
            repetition_penalty: 1.5,
            logprobs: Some(4),
            ..Sampling::GREEDY
        };
        let given = alone(&checkpoint, &[], &request);
        let all: Vec<TokenId> = request.prompt.iter().chain(&given.tokens).copied().collect();
        let logits = logits(&checkpoint, &all);
        for (nth, &token) in given.tokens.iter().enumerate() {
            let position = request.prompt.len() + nth;
            let row = &logits[(position - 1) * vocab..position * vocab];
            let mut edited = row.to_vec();
            for (id, logit) in (0..).map(TokenId).zip(&mut edited) {
                let generated = given.tokens[..nth].iter().filter(|&&t| t == id).count();
                if generated > 0 || request.prompt.contains(&id) {
                    *logit = if *logit > 0.0 { *logit / 1.5 } else { *logit * 1.5 };
                }
                let bias = request.bias.iter().find(|(t, _)| *t == id).map_or(0.0, |(_, bias)| *bias);
                let penalty = if generated > 0 { 1.0 + 0.5 * generated as f32 } else { 0.0 };
                *logit += bias - penalty;
            }
            let best = |row: &[f32]| (0..vocab).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            assert_eq!(token.index(), best(&edited), "token {nth} of {request:?}");
            changed += usize::from(best(&edited) != best(row));

            // Logprobs are the model's own.
            let max = f64::from(row[best(row)]);
            let sum: f64 = row.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
            let logprob = |id: TokenId| f64::from(row[id.index()]) - max - sum.ln();
            let TokenLogprobs { logprob: told, top } = &given.logprobs[nth];
            assert!((f64::from(*told) - logprob(token)).abs() < 1e-4);
            assert_eq!((top.len(), top[0].0.index()), (4, best(row)));
            assert!(top.is_sorted_by(|a, b| a.1 >= b.1));
            assert!(top.iter().all(|&(id, told)| (f64::from(told) - logprob(id)).abs() < 1e-4));
        }
    }
    assert!(changed > 20, "only {changed} tokens were changed by the penalties");
}

fn pinned_sequence() -> Request {
    let prompt = (0..20).map(TokenId).collect();
    let sampling = Sampling { presence_penalty: 0.5, ..Sampling::GREEDY };
    Request { prompt, sampling, bias: Vec::new(), constraint: None, tokens: 3 }
}

fn live(request: &Request, seq: SeqId) -> Live<'_> {
    Live { request, place: 0, given: Given::default(), computed: 0, seq: Some(seq), granted: 0, sampled: false }
}

/// How rows travel is chosen by what the header says of all ranks.
#[test]
fn a_header_that_does_not_speak_of_the_rows_is_refused() {
    let mut bench = Bench::new(&checkpoint());
    let good = bench.next(StepPlan::default());
    for said in [vec![], vec![1], vec![0, 0]] {
        let header = StepHeader { rows_of_rank: said.clone(), ..good.header.clone() };
        let refused = bench.runner.run(&StepPlan { header, ..good.clone() }, &()).unwrap_err();
        assert_eq!(refused, StepError::Header { rank: Rank(0), rows: 0, said });
        assert!(!refused.ends_epoch());
    }
    bench.runner.run(&good, &()).unwrap();
}

#[test]
fn a_plan_that_does_not_fit_is_refused_and_nothing_is_touched() {
    let checkpoint = checkpoint();
    let vocab = checkpoint.config().vocab;
    let mut bench = Bench::new(&checkpoint);
    let request = pinned_sequence();
    let table = random_table(5, vocab, &mut Rng(1));
    let states = table.states() as u32;
    let (living, coming) = (bench.seq(), bench.seq());
    let prompt = Tokens::Given(request.prompt.clone());
    let mut first = live(&request, living);
    let rows = first.rows(Start::At(Position(0)), 0, prompt.clone(), Outputs::Sample);
    let plan = StepPlan {
        tables: vec![table.clone()],
        admit: vec![first.admission(living, 0)],
        rows: vec![rows],
        ..StepPlan::default()
    };
    bench.run(plan).unwrap();

    let admitted = |change: &dyn Fn(&mut Admission)| {
        let mut admission = live(&request, coming).admission(coming, 0);
        change(&mut admission);
        StepPlan { admit: vec![admission], ..StepPlan::default() }
    };
    let cached = |cached: u32, from: u32, granted: u32| {
        let mut live = live(&request, coming);
        live.granted = granted;
        let tokens = Tokens::Given(request.prompt[from as usize..].to_vec());
        let rows = live.rows(Start::At(Position(from)), from, tokens, Outputs::Sample);
        StepPlan { rows: vec![rows], ..admitted(&move |admission| admission.cached = cached) }
    };
    let constrained = |table: u32, state: u32| {
        admitted(&move |admission| admission.constraint = Some(ConstraintStart { table: TableId(table), state }))
    };
    let resampled = live(&request, living).rows(Start::At(Position(3)), 3, prompt.clone(), Outputs::Sample);
    let resampled = Rows { tokens: Tokens::Given(vec![TokenId(3)]), grants: Vec::new(), ..resampled };
    let other = |id: u32| ConstraintTable { id: TableId(id), ..table.clone() };
    let refusals: Vec<(StepPlan, &str)> = vec![
        (admitted(&|admission| admission.cached = CONTEXT + 1), "exceed the context"),
        (cached(16, 17, 0), "beyond the positions computed"),
        (cached(16, 16, 1), "no block"),
        (admitted(&|admission| admission.seq = SeqId(1)), "admitted twice"),
        (constrained(6, 0), "a table or a state"),
        (constrained(5, states), "a table or a state"),
        (StepPlan { tables: vec![other(5)], ..StepPlan::default() }, "table 5 is here already"),
        (StepPlan { tables: vec![other(6), other(6)], ..StepPlan::default() }, "table 6 is here already"),
        (StepPlan { rows: vec![resampled], ..StepPlan::default() }, "sample again"),
        (StepPlan { tables: (6..22).map(other).collect(), ..StepPlan::default() }, "17 tables"),
    ];
    for (plan, why) in refusals {
        let refused = bench.run(plan).unwrap_err();
        assert!(refused.to_string().contains(why), "{refused}, not {why}");
        assert!(!refused.ends_epoch());
    }
    // All of it is as it was.
    let second = first.rows(Start::AfterPrevious, 20, Tokens::Previous, Outputs::Sample);
    let second = bench.run(StepPlan { rows: vec![second], ..StepPlan::default() }).unwrap();
    assert_eq!(second.rows[0].tokens, alone(&checkpoint, &[], &request).tokens[1..2]);
    bench.run(cached(16, 16, 0)).unwrap();
    bench.run(StepPlan { release: vec![coming], tables: vec![other(6)], ..constrained(6, 0) }).unwrap();
}

#[test]
fn a_history_that_breaks_its_constraint_ends_the_epoch() {
    let checkpoint = checkpoint();
    let vocab = checkpoint.config().vocab;
    let mut bench = Bench::new(&checkpoint);
    // Even tokens first, then odd ones, in turn.
    let refused = ConstraintTable::REFUSED;
    let runs = (0..vocab).map(|token| (TokenId(token), token % 2)).collect();
    let table = ConstraintTable { id: TableId(0), runs, classes: 2, next: vec![1, refused, refused, 0] };
    let request = Request { constraint: Some(ConstraintStart { table: TableId(0), state: 0 }), ..pinned_sequence() };
    let seq = bench.seq();
    let mut live = live(&request, seq);
    live.given.tokens = vec![TokenId(4), TokenId(5), TokenId(9)];
    let admit = vec![live.admission(seq, 0)];
    let rows = live.rows(Start::At(Position(0)), 0, Tokens::Given(request.prompt.clone()), Outputs::Sample);
    bench.run(StepPlan { tables: vec![table], ..StepPlan::default() }).unwrap();
    let failed = bench.run(StepPlan { admit, rows: vec![rows], ..StepPlan::default() }).unwrap_err();
    assert_eq!(failed, StepError::Constraint(ConstraintFailure::Refused(Refused(TokenId(9)))));
    assert!(failed.ends_epoch());
    assert_eq!(bench.run(StepPlan::default()).unwrap_err(), failed);
    // What came before is told still.
    bench.repeat(&mut Rng(0));
}

#[test]
fn results_are_kept_until_they_have_arrived() {
    let mut bench = Bench::new(&checkpoint());
    let plans: Vec<StepPlan> = (0..20)
        .map(|_| {
            let mut plan = bench.next(StepPlan::default());
            plan.header.applied = StepId(0);
            bench.runner.run(&plan, &()).unwrap();
            bench.fence = plan.header.fence;
            plan
        })
        .collect();
    let (old, kept) = plans.split_at(plans.len() - STEPS_IN_FLIGHT - 1);
    for plan in kept {
        assert_eq!(bench.runner.run(plan, &()).unwrap().fence, plan.header.fence);
    }
    let forgotten = bench.runner.run(old.last().unwrap(), &()).unwrap_err();
    assert!(matches!(forgotten, StepError::OutOfStep(_)), "{forgotten}");
    let too_many = StepPlan { release: vec![SeqId(1); PLACES as usize + 1], ..StepPlan::default() };
    let refused = bench.run(too_many).unwrap_err();
    assert!(matches!(refused, StepError::Plan(PlanError::TooMany { .. })), "{refused}");
    bench.run(StepPlan::default()).unwrap();
}
