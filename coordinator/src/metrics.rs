//! What `/metrics` shows.
//!
//! One struct of handles, passed to whoever measures; nothing is global. Names that vLLM has already are used as they
//! are, so that dashboards and autoscalers work unchanged; what is Phalanx's own begins with `phalanx_`. Every label set
//! exists from the start, at zero.

use std::time::Duration;

use phalanx_planner::Stats;
use phalanx_proto::{Phase, StepResult};
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::engine_client::{CellState, CellStatus, WorkerState};
use crate::harmony::{RepairKind, Repairs};

/// Seconds to the first token.
const TTFT_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// Seconds between tokens.
const ITL_BUCKETS: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// Seconds between tokens, fine enough for a GPU.
const FINE_ITL_BUCKETS: [f64; 16] =
    [0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0];
/// Seconds of a whole request.
const E2E_BUCKETS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// Tokens of a step.
const STEP_TOKENS_BUCKETS: [f64; 14] =
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];
/// Seconds of a phase of a step.
const PHASE_BUCKETS: [f64; 15] =
    [0.00001, 0.000_03, 0.0001, 0.0003, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
/// Seconds that a request waits or is worked on.
const REQUEST_BUCKETS: [f64; 21] = E2E_BUCKETS;
/// Tokens of a request.
const REQUEST_TOKENS_BUCKETS: [f64; 16] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];
/// Choices of a request.
const CHOICES_BUCKETS: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];
/// Rows of the fullest rank over the mean.
const IMBALANCE_BUCKETS: [f64; 9] = [1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0];

/// How a sequence ended, as `vllm:request_success_total` counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The model or a stop string ended it.
    Stop,
    /// It reached its most tokens.
    Length,
    /// The client left.
    Abort,
    /// The engine failed.
    Error,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    /// The value of the label `finished_reason`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// The handles. Drivers report what their cells do, the API what requests meet; what a cell is doing is read at each
/// scrape.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    cells: Vec<CellMetrics>,
    params_n: Histogram,
    params_max_tokens: Histogram,
    harmony_repairs: IntCounterVec,
    cell_workers: IntGaugeVec,
    http_requests: IntCounterVec,
}

/// The handles of one cell, which the label `engine` names.
#[derive(Clone, Debug)]
pub struct CellMetrics {
    running: Gauge,
    waiting: Gauge,
    waiting_by_class: [Gauge; 2],
    kv_usage: Gauge,
    cache_usage: Gauge,
    preemptions: Mirror,
    prefix_queries: Mirror,
    prefix_hits: Mirror,
    prompt_tokens: IntCounter,
    prompt_tokens_cached: IntCounter,
    generation_tokens: IntCounter,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    fine_inter_token_latency: Histogram,
    request_latency: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_success: [IntCounter; Outcome::ALL.len()],
    steps: IntCounter,
    step_tokens: Histogram,
    step_imbalance: Histogram,
    step_seconds: [Histogram; Phase::ALL.len()],
    dispatch_rows: IntCounter,
    combine_rows: IntCounter,
    bytes_sent: IntCounter,
    bytes_received: IntCounter,
    epoch: IntGauge,
    states: [IntGauge; CellState::NAMES.len()],
}

/// A counter that follows a total kept elsewhere.
#[derive(Clone, Debug)]
struct Mirror(IntCounter);

impl Mirror {
    fn set(&self, total: u64) {
        self.0.inc_by(total.saturating_sub(self.0.get()));
    }
}

/// The times of a request that has ended, and its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestTimes {
    /// From its submission until it got a place on a rank.
    pub queued: Duration,
    /// From then to its first token.
    pub prefill: Duration,
    /// From there to its last.
    pub decode: Duration,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Tokens it was given.
    pub generated_tokens: u32,
}

impl Metrics {
    /// Handles of a server of `model` with so many cells.
    #[must_use]
    pub fn new(model: &str, cells: usize) -> Self {
        let registry = Registry::new();
        let make = Maker { registry: &registry, model, engine: "" };
        let metrics = Self {
            cells: (0..cells).map(|cell| CellMetrics::new(&registry, model, &cell.to_string())).collect(),
            params_n: make.plain("vllm:request_params_n", "Choices asked for", &CHOICES_BUCKETS),
            params_max_tokens: make.plain(
                "vllm:request_params_max_tokens",
                "Most tokens asked for",
                &REQUEST_TOKENS_BUCKETS,
            ),
            harmony_repairs: own_counters(
                &registry,
                "phalanx_harmony_repairs_total",
                "Places where what the model wrote strayed from harmony and was mended",
                "kind",
                RepairKind::ALL.map(RepairKind::label),
            ),
            cell_workers: register(
                &registry,
                IntGaugeVec::new(Opts::new("phalanx_cell_workers", "Workers of all cells by state"), &["state"]),
            ),
            http_requests: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("phalanx_http_requests_total", "HTTP requests answered"),
                    &["route", "code"],
                ),
            ),
            registry: registry.clone(),
        };
        for state in WorkerState::ALL {
            metrics.cell_workers.with_label_values(&[state.name()]).set(0);
        }
        let info = Opts::new("phalanx_build_info", "Always 1; the labels say which build this is");
        let info = register(&registry, GaugeVec::new(info, &["version"]));
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        metrics
    }

    /// The handles of a cell.
    ///
    /// # Panics
    /// If there is no such cell.
    #[must_use]
    pub fn cell(&self, cell: usize) -> &CellMetrics {
        &self.cells[cell]
    }

    /// How much KV memory a cell has, for dashboards and gateways that compute with it.
    pub fn cache_config(&self, cell: usize, block_size: u32, blocks: u64, prefix_cache: bool) {
        let info = Opts::new("vllm:cache_config_info", "Always 1; the labels say how much KV memory there is");
        let info = info.const_label("engine", cell.to_string());
        let info = info.const_label("block_size", block_size.to_string());
        let info = info.const_label("num_gpu_blocks", blocks.to_string());
        let info = info.const_label("enable_prefix_caching", if prefix_cache { "True" } else { "False" });
        register(&self.registry, Gauge::with_opts(info)).set(1.0);
    }

    /// A request with so many choices of at most so many tokens was admitted.
    pub fn asked(&self, choices: u32, max_tokens: u32) {
        self.params_n.observe(f64::from(choices));
        self.params_max_tokens.observe(f64::from(max_tokens));
    }

    /// What the model wrote in a sequence needed these repairs.
    pub fn repaired(&self, repairs: &Repairs) {
        for kind in RepairKind::ALL {
            self.harmony_repairs.with_label_values(&[kind.label()]).inc_by(u64::from(repairs.count(kind)));
        }
    }

    /// Requests to these routes are to be counted from zero.
    pub(crate) fn expect_routes(&self, routes: &[&str]) {
        for route in routes {
            self.http_requests.with_label_values(&[route, "200"]);
        }
    }

    /// A request to `route` was answered with `code`.
    pub fn answered(&self, route: &str, code: u16) {
        self.http_requests.with_label_values(&[route, &code.to_string()]).inc();
    }

    /// The text of `/metrics`, with the cells as `cells` says.
    #[must_use]
    pub fn render(&self, cells: &[CellStatus]) -> String {
        for (metrics, status) in self.cells.iter().zip(cells) {
            metrics.running.set(f64::from(status.running));
            metrics.waiting.set(f64::from(status.waiting));
            for (gauge, name) in metrics.states.iter().zip(CellState::NAMES) {
                gauge.set(i64::from(status.state.name() == name));
            }
            metrics.epoch.set(i64::try_from(status.epoch.0).unwrap_or(i64::MAX));
        }
        for state in WorkerState::ALL {
            let workers = cells.iter().flat_map(|status| &status.workers);
            let count = workers.filter(|worker| worker.state == state).count();
            self.cell_workers.with_label_values(&[state.name()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let mut text = String::new();
        TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text).expect("a string takes every write");
        text
    }
}

impl CellMetrics {
    fn new(registry: &Registry, model: &str, engine: &str) -> Self {
        let make = Maker { registry, model, engine };
        let success = "Sequences that ended, by how";
        let seconds = "Time of a rank in a phase of a step";
        let class = |class| make.gauge_with("phalanx_requests_waiting", "Sequences that wait", "class", class);
        let rows = |kind| make.counter_with("phalanx_exchange_rows_total", "Rows sent to other ranks", "kind", kind);
        let exchanged = "Bytes exchanged with other ranks, frames included";
        let bytes = |to| make.counter_with("phalanx_exchange_bytes_total", exchanged, "direction", to);
        Self {
            running: make.gauge("vllm:num_requests_running", "Sequences that take part in steps"),
            waiting: make.gauge("vllm:num_requests_waiting", "Sequences that wait for their first step"),
            waiting_by_class: ["interactive", "batch"].map(class),
            kv_usage: make.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks that sequences hold, from 0 to 1"),
            cache_usage: make.gauge("phalanx_prefix_cache_usage", "Share of KV blocks that only the cache holds"),
            preemptions: Mirror(make.counter("vllm:num_preemptions_total", "Sequences sent back for want of blocks")),
            prefix_queries: Mirror(make.counter("vllm:prefix_cache_queries_total", "Tokens looked up in the cache")),
            prefix_hits: Mirror(make.counter("vllm:prefix_cache_hits_total", "Tokens found in the cache")),
            prompt_tokens: make.counter("vllm:prompt_tokens_total", "Prompt tokens of sequences admitted"),
            prompt_tokens_cached: make.counter("vllm:prompt_tokens_cached_total", "Those found in the cache"),
            generation_tokens: make.counter("vllm:generation_tokens_total", "Tokens generated"),
            time_to_first_token: make.histogram(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token",
                &TTFT_BUCKETS,
            ),
            inter_token_latency: make.histogram(
                "vllm:inter_token_latency_seconds",
                "Between the tokens of a sequence",
                &ITL_BUCKETS,
            ),
            fine_inter_token_latency: make.histogram(
                "phalanx_itl_seconds",
                "Between the tokens of a sequence, in buckets fine enough for a GPU",
                &FINE_ITL_BUCKETS,
            ),
            request_latency: make.histogram(
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival to the end of a sequence",
                &E2E_BUCKETS,
            ),
            queue_time: make.histogram(
                "vllm:request_queue_time_seconds",
                "From a sequence's submission to its place on a rank",
                &REQUEST_BUCKETS,
            ),
            prefill_time: make.histogram(
                "vllm:request_prefill_time_seconds",
                "From a sequence's place on a rank to its first token",
                &REQUEST_BUCKETS,
            ),
            decode_time: make.histogram(
                "vllm:request_decode_time_seconds",
                "From a sequence's first token to its last",
                &REQUEST_BUCKETS,
            ),
            request_prompt_tokens: make.histogram(
                "vllm:request_prompt_tokens",
                "Tokens of a sequence's prompt",
                &REQUEST_TOKENS_BUCKETS,
            ),
            request_generation_tokens: make.histogram(
                "vllm:request_generation_tokens",
                "Tokens that a sequence was given",
                &REQUEST_TOKENS_BUCKETS,
            ),
            request_success: Outcome::ALL.map(|outcome| {
                make.counter_with("vllm:request_success_total", success, "finished_reason", outcome.name())
            }),
            steps: make.counter("phalanx_steps_total", "Steps applied"),
            step_tokens: make.histogram("vllm:iteration_tokens_total", "Rows of a step", &STEP_TOKENS_BUCKETS),
            step_imbalance: make.histogram(
                "phalanx_step_imbalance",
                "Rows of the fullest rank of a step over the mean of its ranks",
                &IMBALANCE_BUCKETS,
            ),
            step_seconds: Phase::ALL
                .map(|phase| make.phase_histogram("phalanx_step_seconds", seconds, "phase", phase.name())),
            dispatch_rows: rows("dispatch"),
            combine_rows: rows("combine"),
            bytes_sent: bytes("sent"),
            bytes_received: bytes("received"),
            epoch: register(
                registry,
                IntGauge::with_opts(
                    Opts::new("phalanx_cell_epoch", "The epoch in which the cell marches")
                        .const_label("engine", engine),
                ),
            ),
            states: CellState::NAMES.map(|state| {
                let state = Opts::new("phalanx_cell_state", "1 for what the cell is doing").const_label("state", state);
                register(registry, IntGauge::with_opts(state.const_label("engine", engine)))
            }),
        }
    }

    /// A step of `rows` rows over all ranks went out.
    pub fn step(&self, rows: usize) {
        self.step_tokens.observe(rows as f64);
    }

    /// All ranks have answered a step.
    pub fn step_applied(&self) {
        self.steps.inc();
    }

    /// A rank's result of a step came in.
    pub fn result(&self, result: &StepResult) {
        for (phase, histogram) in Phase::ALL.into_iter().zip(&self.step_seconds) {
            histogram.observe(Duration::from_micros(result.phases.get(phase)).as_secs_f64());
        }
        let sent = &result.exchange;
        self.dispatch_rows.inc_by(sent.dispatch_rows);
        self.combine_rows.inc_by(sent.combine_rows);
        self.bytes_sent.inc_by(sent.bytes_sent);
        self.bytes_received.inc_by(sent.bytes_received);
    }

    /// What the engine has done and holds.
    pub fn engine(&self, stats: &Stats) {
        self.kv_usage.set(stats.kv_usage);
        self.cache_usage.set(stats.cache_usage);
        for (gauge, waiting) in self.waiting_by_class.iter().zip(stats.waiting) {
            gauge.set(waiting as f64);
        }
        self.preemptions.set(stats.preemptions);
        self.prefix_queries.set(stats.prefix_queries);
        self.prefix_hits.set(stats.prefix_hits);
    }

    /// How level a step that went out is.
    pub fn imbalance(&self, imbalance: f64) {
        self.step_imbalance.observe(imbalance);
    }

    /// A sequence was admitted.
    pub fn admitted(&self, prompt_tokens: u64) {
        self.prompt_tokens.inc_by(prompt_tokens);
    }

    /// A sequence got a place, and so many tokens of its prompt were in the cache.
    pub fn started(&self, cached_tokens: u32) {
        self.prompt_tokens_cached.inc_by(u64::from(cached_tokens));
    }

    /// A sequence was given the last token that it wanted.
    pub fn finished(&self, times: &RequestTimes) {
        self.queue_time.observe(times.queued.as_secs_f64());
        self.prefill_time.observe(times.prefill.as_secs_f64());
        self.decode_time.observe(times.decode.as_secs_f64());
        self.request_prompt_tokens.observe(f64::from(times.prompt_tokens));
        self.request_generation_tokens.observe(f64::from(times.generated_tokens));
    }

    /// A sequence's first `tokens` came `after` the request arrived.
    pub fn first_tokens(&self, tokens: u64, after: Duration) {
        self.generation_tokens.inc_by(tokens);
        self.time_to_first_token.observe(after.as_secs_f64());
    }

    /// A sequence's next `tokens` came `after` the ones before.
    pub fn next_tokens(&self, tokens: u64, after: Duration) {
        self.generation_tokens.inc_by(tokens);
        self.inter_token_latency.observe(after.as_secs_f64());
        self.fine_inter_token_latency.observe(after.as_secs_f64());
    }

    /// A sequence ended `after` the request arrived.
    pub fn ended(&self, outcome: Outcome, after: Duration) {
        self.request_success[outcome as usize].inc();
        if matches!(outcome, Outcome::Stop | Outcome::Length) {
            self.request_latency.observe(after.as_secs_f64());
        }
    }
}

/// Makes metrics with vLLM's labels, or with only those that tell cells apart.
struct Maker<'a> {
    registry: &'a Registry,
    model: &'a str,
    engine: &'a str,
}

impl Maker<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        let opts = Opts::new(name, help).const_label("engine", self.engine);
        if name.starts_with("vllm:") { opts.const_label("model_name", self.model) } else { opts }
    }

    fn gauge(&self, name: &str, help: &str) -> Gauge {
        register(self.registry, Gauge::with_opts(self.opts(name, help)))
    }

    fn gauge_with(&self, name: &str, help: &str, label: &str, value: &str) -> Gauge {
        register(self.registry, Gauge::with_opts(self.opts(name, help).const_label(label, value)))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        register(self.registry, IntCounter::with_opts(self.opts(name, help)))
    }

    fn counter_with(&self, name: &str, help: &str, label: &str, value: &str) -> IntCounter {
        register(self.registry, IntCounter::with_opts(self.opts(name, help).const_label(label, value)))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.histogram_of(self.opts(name, help), buckets)
    }

    fn phase_histogram(&self, name: &str, help: &str, label: &str, value: &str) -> Histogram {
        self.histogram_of(self.opts(name, help).const_label(label, value), &PHASE_BUCKETS)
    }

    fn plain(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.histogram_of(Opts::new(name, help).const_label("model_name", self.model), buckets)
    }

    fn histogram_of(&self, common_opts: Opts, buckets: &[f64]) -> Histogram {
        register(self.registry, Histogram::with_opts(HistogramOpts { common_opts, buckets: buckets.to_vec() }))
    }
}

fn own_counters<const N: usize>(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
    values: [&str; N],
) -> IntCounterVec {
    let counters = register(registry, IntCounterVec::new(Opts::new(name, help), &[label]));
    for value in values {
        counters.with_label_values(&[value]);
    }
    counters
}

fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let collector = made.expect("names and labels are constants that prometheus accepts");
    registry.register(Box::new(collector.clone())).expect("each name is registered once");
    collector
}
