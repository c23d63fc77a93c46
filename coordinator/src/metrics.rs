//! What `/metrics` shows.
//!
//! One struct of handles, passed to whoever measures; nothing is global. Names that vLLM has already are used as they
//! are, so that dashboards and autoscalers work unchanged; what is Phalanx's own begins with `phalanx_`. Every label set
//! exists from the start, at zero.

use std::time::Duration;

use phalanx_proto::{Phase, StepResult};
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::engine_client::{CellStatus, WorkerState};
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
/// The value of the label `engine`: a coordinator has one.
const ENGINE: &str = "0";

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

/// The handles. The driver reports steps, the API requests; what a cell is doing is read at each scrape.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests_running: Gauge,
    requests_waiting: Gauge,
    kv_cache_usage: Gauge,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    fine_inter_token_latency: Histogram,
    request_latency: Histogram,
    request_success: IntCounterVec,
    step_tokens: Histogram,
    step_seconds: HistogramVec,
    exchange_rows: IntCounterVec,
    exchange_bytes: IntCounterVec,
    harmony_repairs: IntCounterVec,
    cell_epoch: IntGauge,
    cell_workers: IntGaugeVec,
    http_requests: IntCounterVec,
}

impl Metrics {
    /// Handles of a server of `model`.
    #[must_use]
    pub fn new(model: &str) -> Self {
        let registry = Registry::new();
        let make = Maker { registry: &registry, model };
        let metrics = Self {
            requests_running: make.gauge("vllm:num_requests_running", "Sequences that take part in steps"),
            requests_waiting: make.gauge("vllm:num_requests_waiting", "Sequences that wait for their first step"),
            kv_cache_usage: make.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, from 0 to 1"),
            prompt_tokens: make.counter("vllm:prompt_tokens_total", "Prompt tokens of sequences admitted"),
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
            request_success: make.counters(
                "vllm:request_success_total",
                "Sequences that ended, by how",
                "finished_reason",
                Outcome::ALL.map(Outcome::name),
            ),
            step_tokens: make.histogram("vllm:iteration_tokens_total", "Rows of a step", &STEP_TOKENS_BUCKETS),
            step_seconds: own_histograms(
                &registry,
                "phalanx_step_seconds",
                "Time of a rank in a phase of a step",
                "phase",
                Phase::ALL.map(Phase::name),
            ),
            exchange_rows: own_counters(
                &registry,
                "phalanx_exchange_rows_total",
                "Rows sent to other ranks",
                &["kind"],
                ["dispatch", "combine"],
            ),
            exchange_bytes: own_counters(
                &registry,
                "phalanx_exchange_bytes_total",
                "Bytes exchanged with other ranks, frames included",
                &["direction"],
                ["sent", "received"],
            ),
            harmony_repairs: own_counters(
                &registry,
                "phalanx_harmony_repairs_total",
                "Places where what the model wrote strayed from harmony and was mended",
                &["kind"],
                RepairKind::ALL.map(RepairKind::label),
            ),
            cell_epoch: register(&registry, IntGauge::new("phalanx_cell_epoch", "The epoch in which the cell marches")),
            cell_workers: register(
                &registry,
                IntGaugeVec::new(Opts::new("phalanx_cell_workers", "Workers of the cell by state"), &["state"]),
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

    /// A step of `rows` rows over all ranks went out.
    pub fn step(&self, rows: usize) {
        self.step_tokens.observe(rows as f64);
    }

    /// A rank's result of a step came in.
    pub fn result(&self, result: &StepResult) {
        for phase in Phase::ALL {
            let time = Duration::from_micros(result.phases.get(phase));
            self.step_seconds.with_label_values(&[phase.name()]).observe(time.as_secs_f64());
        }
        let sent = &result.exchange;
        self.exchange_rows.with_label_values(&["dispatch"]).inc_by(sent.dispatch_rows);
        self.exchange_rows.with_label_values(&["combine"]).inc_by(sent.combine_rows);
        self.exchange_bytes.with_label_values(&["sent"]).inc_by(sent.bytes_sent);
        self.exchange_bytes.with_label_values(&["received"]).inc_by(sent.bytes_received);
    }

    /// The share of KV blocks in use changed.
    pub fn kv_usage(&self, share: f64) {
        self.kv_cache_usage.set(share);
    }

    /// A sequence was admitted.
    pub fn admitted(&self, prompt_tokens: u64) {
        self.prompt_tokens.inc_by(prompt_tokens);
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
        self.request_success.with_label_values(&[ENGINE, outcome.name()]).inc();
        if matches!(outcome, Outcome::Stop | Outcome::Length) {
            self.request_latency.observe(after.as_secs_f64());
        }
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

    /// The text of `/metrics`, with the cell as `status` says.
    #[must_use]
    pub fn render(&self, status: &CellStatus) -> String {
        self.requests_running.set(f64::from(status.running));
        self.requests_waiting.set(f64::from(status.waiting));
        self.cell_epoch.set(i64::try_from(status.epoch.0).unwrap_or(i64::MAX));
        for state in WorkerState::ALL {
            let count = status.workers.iter().filter(|worker| worker.state == state).count();
            self.cell_workers.with_label_values(&[state.name()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let mut text = String::new();
        TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text).expect("a string takes every write");
        text
    }
}

/// Makes metrics with vLLM's labels.
struct Maker<'a> {
    registry: &'a Registry,
    model: &'a str,
}

impl Maker<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help).const_label("model_name", self.model)
    }

    fn gauge(&self, name: &str, help: &str) -> Gauge {
        register(self.registry, Gauge::with_opts(self.opts(name, help).const_label("engine", ENGINE)))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        register(self.registry, IntCounter::with_opts(self.opts(name, help).const_label("engine", ENGINE)))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let common_opts = self.opts(name, help).const_label("engine", ENGINE);
        let opts = HistogramOpts { common_opts, buckets: buckets.to_vec() };
        register(self.registry, Histogram::with_opts(opts))
    }

    fn counters<const N: usize>(&self, name: &str, help: &str, label: &str, values: [&str; N]) -> IntCounterVec {
        let counters = register(self.registry, IntCounterVec::new(self.opts(name, help), &["engine", label]));
        for value in values {
            counters.with_label_values(&[ENGINE, value]);
        }
        counters
    }
}

fn own_counters<const N: usize>(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &[&str; 1],
    values: [&str; N],
) -> IntCounterVec {
    let counters = register(registry, IntCounterVec::new(Opts::new(name, help), label));
    for value in values {
        counters.with_label_values(&[value]);
    }
    counters
}

fn own_histograms<const N: usize>(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
    values: [&str; N],
) -> HistogramVec {
    let opts = HistogramOpts { common_opts: Opts::new(name, help), buckets: PHASE_BUCKETS.to_vec() };
    let histograms = register(registry, HistogramVec::new(opts, &[label]));
    for value in values {
        histograms.with_label_values(&[value]);
    }
    histograms
}

fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let collector = made.expect("names and labels are constants that prometheus accepts");
    registry.register(Box::new(collector.clone())).expect("each name is registered once");
    collector
}
