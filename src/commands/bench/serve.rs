//! `phalanx bench serve`: load for any server that speaks OpenAI's API, and what its clients see.
//!
//! Closed loop: so many clients, each asks again as soon as it has its answer. Open loop: requests come at random at a
//! rate, whatever the server does, for as long as a client is free; how late they were sent is reported.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::report::{Report, line};
use super::request::{Outcome, Target};
use super::workload::{Asked, Shape, arrivals, dataset};
use crate::cli::BadFlags;
use crate::client::{self, ChatClient};
use crate::commands::say_json;
use crate::server;

/// Longest wait for a connection.
const CONNECT_WAIT: Duration = Duration::from_secs(10);
/// Stack of a client's thread, in bytes.
const STACK_BYTES: usize = 512 << 10;
/// Clients at once.
const CLIENTS_MAX: u32 = 4096;
/// Clients of a closed loop.
const CLIENTS: u32 = 8;

/// Arguments of `bench serve`.
#[derive(Debug, Args)]
pub struct ServeBenchArgs {
    /// The server
    #[arg(long, value_name = "URL", value_parser = client::url, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// The model to ask [default: the first one served]
    #[arg(long)]
    model: Option<String>,
    /// The key that the server asks for
    #[arg(long, env = "PHALANX_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Requests in all
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    requests: u64,
    /// Requests at once at most [default: 8; with --rate as many as there are, up to 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(CLIENTS_MAX)))]
    concurrency: Option<u32>,
    /// Requests a second, at random moments [default: each client asks again as soon as it has its answer]
    #[arg(long, value_name = "R", value_parser = positive)]
    rate: Option<f64>,
    /// Requests before those that count; of a dataset, the lines that follow theirs
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    warmup: u64,
    /// Words of each prompt, of about one token each
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=131_072))]
    input_tokens: u32,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=131_072))]
    output_tokens: u32,
    /// Share by which both are spread to either side
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    spread: f64,
    /// Words that all prompts begin with
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=131_072))]
    shared_prefix_tokens: u32,
    /// Ask what is in this file instead: one JSON object a line, with `messages` or `prompt`
    #[arg(long, value_name = "FILE")]
    dataset: Option<PathBuf>,
    /// Let the model end its answers itself
    #[arg(long)]
    natural_end: bool,
    /// Temperature of the requests
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    temperature: f64,
    /// Decides prompts, arrivals and the requests' own seeds
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Ask for answers in one piece
    #[arg(long)]
    no_stream: bool,
    /// Longest wait for an answer
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout_seconds: u64,
    /// Send nothing more after this time
    #[arg(long, value_name = "S", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    max_seconds: u64,
    /// Write each request to this file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Succeed also if requests fail
    #[arg(long)]
    allow_failures: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl ServeBenchArgs {
    /// Clients for so many requests.
    fn clients(&self, requests: u64) -> u32 {
        let most = self.concurrency.unwrap_or_else(|| if self.rate.is_some() { CLIENTS_MAX } else { CLIENTS });
        most.min(u32::try_from(requests).unwrap_or(u32::MAX))
    }
}

fn number(text: &str, what: &str, right: impl Fn(f64) -> bool) -> Result<f64, String> {
    text.parse().ok().filter(|&number| right(number)).ok_or_else(|| format!("must be {what}"))
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, "above 0 and at most 1000000", |n| n > 0.0 && n <= 1e6)
}

fn share(text: &str) -> Result<f64, String> {
    number(text, "between 0 and 1", |n| (0.0..=1.0).contains(&n))
}

fn temperature(text: &str) -> Result<f64, String> {
    number(text, "between 0 and 2", |n| (0.0..=2.0).contains(&n))
}

/// Runs `phalanx bench serve`.
///
/// # Errors
/// The server cannot be reached, or the dataset is none.
pub fn run(args: ServeBenchArgs) -> Result<ExitCode> {
    let asked = match &args.dataset {
        Some(path) => Some(dataset(path, args.output_tokens).map_err(|error| BadFlags(format!("{error:#}")))?),
        None => None,
    };
    let client = ChatClient::connect(&args.url, args.api_key.clone(), args.model.clone())?;
    // A path that cannot be written is found out before the measurement, not after it.
    let mut save = match args.save.as_deref() {
        Some(path) => Some((path, File::create(path).with_context(cannot_write(path))?)),
        None => None,
    };
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(CONNECT_WAIT))
        .timeout_global(Some(Duration::from_secs(args.timeout_seconds)))
        .max_idle_connections(args.clients(args.requests) as usize)
        .max_idle_connections_per_host(args.clients(args.requests) as usize)
        .build()
        .new_agent();
    let target = Target {
        agent,
        url: args.url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
        api_key: args.api_key.clone(),
        model: client.model().to_owned(),
        stream: !args.no_stream,
        temperature: args.temperature,
        ignore_eos: !args.natural_end,
    };
    let shape = Shape {
        input: args.input_tokens,
        output: args.output_tokens,
        spread: args.spread,
        shared: args.shared_prefix_tokens,
        seed: args.seed,
    };
    let load = Load { target, shape, dataset: asked, seed: args.seed };
    let stop = stop_on_interrupt()?;
    if args.warmup > 0 {
        // Numbers of their own, so that nothing they leave in a cache is asked for again; unless a dataset has too few
        // lines.
        Run::new(&args, args.requests, args.warmup, false).drive(&load, &stop)?;
    }
    let run = Run::new(&args, 0, args.requests, !args.json && std::io::stderr().is_terminal());
    let (sent, report) = run.drive(&load, &stop)?;
    if let Some((path, file)) = &mut save {
        let lines: String =
            sent.iter().map(|(number, at, outcome)| format!("{}\n", line(*number, *at, outcome))).collect();
        file.write_all(lines.as_bytes()).with_context(cannot_write(path))?;
    }
    if args.json {
        say_json(&report.json())?;
    } else {
        report.say()?;
    }
    if report.errors().is_empty() || args.allow_failures {
        return Ok(ExitCode::SUCCESS);
    }
    crate::commands::note(
        "some requests failed: lower --rate or --concurrency, look at the server's log, or --allow-failures",
    );
    Ok(ExitCode::FAILURE)
}

fn cannot_write(path: &Path) -> impl Fn() -> String {
    move || format!("cannot write {}", path.display())
}

/// What is asked of whom.
struct Load {
    target: Target,
    shape: Shape,
    dataset: Option<Vec<Asked>>,
    seed: u64,
}

impl Load {
    fn asked(&self, number: u64) -> Asked {
        match &self.dataset {
            Some(all) => all[usize::try_from(number % all.len() as u64).unwrap_or(0)].clone(),
            None => self.shape.asked(number),
        }
    }
}

type Sent = (u64, Duration, Outcome);

/// A run of requests.
struct Run {
    first: u64,
    requests: u64,
    clients: u32,
    /// When each request is due; none if it is as soon as a client is free.
    due: Option<Vec<Duration>>,
    until: Duration,
    bar: ProgressBar,
}

impl Run {
    fn new(args: &ServeBenchArgs, first: u64, requests: u64, shown: bool) -> Self {
        let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} requests, {elapsed}")
            .expect("the template is well formed")
            .progress_chars("=> ");
        let bar = if shown { ProgressBar::new(requests).with_style(style) } else { ProgressBar::hidden() };
        let count = usize::try_from(requests).unwrap_or(usize::MAX);
        Self {
            first,
            requests,
            clients: args.clients(requests),
            due: args.rate.map(|rate| arrivals(rate, args.seed).take(count).collect()),
            until: Duration::from_secs(args.max_seconds),
            bar,
        }
    }

    /// Sends all requests, each client one at a time.
    fn drive(&self, load: &Load, stop: &AtomicBool) -> Result<(Vec<Sent>, Report)> {
        let begun = Instant::now();
        let next = Mutex::new(0u64);
        let (busy, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let latest = Mutex::new(None);
        let sent = Mutex::new(Vec::new());
        let client = || {
            loop {
                let number = {
                    let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
                    // Whoever is next waits until it is due, and nobody else needs to before that.
                    if *next >= self.requests || !self.wait_for(*next, begun, stop) {
                        return;
                    }
                    *next += 1;
                    *next - 1
                };
                if let Some(due) = self.due(number) {
                    let mut latest = latest.lock().unwrap_or_else(PoisonError::into_inner);
                    *latest = (*latest).max(Some(begun.elapsed().saturating_sub(due)));
                }
                most.fetch_max(busy.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                let (at, number) = (begun.elapsed(), self.first + number);
                let outcome = load.target.ask(&load.asked(number), load.seed.wrapping_add(number));
                busy.fetch_sub(1, Ordering::Relaxed);
                self.bar.inc(1);
                self.bar.set_message(format!("{} under way", busy.load(Ordering::Relaxed)));
                sent.lock().unwrap_or_else(PoisonError::into_inner).push((number, at, outcome));
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.clients {
                let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
                thread.spawn_scoped(scope, client).context("cannot start a client's thread; lower --concurrency")?;
            }
            anyhow::Ok(())
        })?;
        self.bar.finish_and_clear();
        let mut sent = sent.into_inner().unwrap_or_else(PoisonError::into_inner);
        sent.sort_by_key(|(number, ..)| *number);
        let outcomes = sent.iter().map(|(.., outcome)| outcome.clone()).collect();
        let latest = latest.into_inner().unwrap_or_else(PoisonError::into_inner);
        let report = Report::new(outcomes, begun.elapsed(), most.load(Ordering::Relaxed), latest);
        Ok((sent, report))
    }

    fn due(&self, number: u64) -> Option<Duration> {
        self.due.as_ref().and_then(|due| due.get(usize::try_from(number).ok()?)).copied()
    }

    /// Waits until a request is due; false if it is not to be sent any more.
    fn wait_for(&self, number: u64, begun: Instant, stop: &AtomicBool) -> bool {
        let due = self.due(number);
        loop {
            let now = begun.elapsed();
            if stop.load(Ordering::Relaxed) || now >= self.until {
                return false;
            }
            match due.and_then(|due| due.checked_sub(now)).filter(|left| !left.is_zero()) {
                Some(left) => std::thread::sleep(left.min(Duration::from_millis(50))),
                None => return true,
            }
        }
    }
}

/// Turns true when the user interrupts: what is under way is finished, and nothing more is sent.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let (seen, runtime) = (Arc::clone(&stop), server::runtime()?);
    std::thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(move || {
            runtime.block_on(server::interrupted());
            seen.store(true, Ordering::Relaxed);
        })
        .context("cannot start a thread")?;
    Ok(stop)
}
