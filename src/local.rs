//! A cell whose ranks are threads of this process, driven by the same plans as any other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use phalanx_model::Checkpoint;
use phalanx_planner::{Engine, EngineConfig, Event, Request};
use phalanx_proto::{
    ExchangeCounters, Fence, Layout, Limits, MemoryPlan, PhaseTimes, Placement, Rank, StepPlan, StepResult,
};
use phalanx_worker::collectives::local::{self, Local};
use phalanx_worker::device::{Device, DeviceReport, Processor};
use phalanx_worker::rank::{LoadedModel, LoadedRank, Share};
use phalanx_worker::runner::StepError;

/// How a cell is laid out.
#[derive(Clone, Copy, Debug)]
pub struct CellOptions {
    /// Ranks that share the experts.
    pub workers: u32,
    /// How each computes.
    pub device: Device,
    /// The bounds of each rank.
    pub limits: Limits,
}

/// Sums over the steps of a cell.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Steps.
    pub steps: u64,
    /// Rows that the ranks exchanged.
    pub exchange: ExchangeCounters,
    /// Microseconds of all ranks by phase.
    pub phases: PhaseTimes,
}

type Answer = (Rank, Result<StepResult, StepError>);

/// A running cell.
pub struct LocalCell {
    engine: Engine,
    plans: Vec<SyncSender<StepPlan>>,
    answers: Receiver<Answer>,
    threads: Vec<JoinHandle<()>>,
    totals: Totals,
}

impl LocalCell {
    /// Loads every rank, side by side. `on_progress` hears the bytes read by all ranks so far, and in all.
    ///
    /// # Errors
    /// The layout is impossible, the memory does not suffice, or a rank does not load.
    pub fn start(
        checkpoint: &Arc<Checkpoint>,
        options: &CellOptions,
        mut on_progress: impl FnMut(u64, u64),
    ) -> Result<Self> {
        let config = checkpoint.config();
        let layout = Layout::new(options.workers, 0)?;
        let layers = u32::try_from(config.layers.len()).context("too many layers")?;
        let placement = Arc::new(Placement::contiguous(layers, config.experts, layout));
        let mut left = BTreeMap::new();
        for rank in layout.ranks() {
            let DeviceReport { backend, memory_pool, .. } = options.device.of(rank.0).look(checkpoint)?;
            let memory = left.entry(memory_pool).or_insert(backend.memory);
            let plan = MemoryPlan::new(config, layout, &placement, rank, &options.limits, &backend).fit(*memory)?;
            memory.0 -= plan.total().0;
        }

        let (answer, answers) = channel();
        let (loaded, loading) = channel();
        let mut plans = Vec::new();
        let mut threads = Vec::new();
        for (rank, collectives) in layout.ranks().zip(local::group(options.workers)) {
            let (plan, planned) = sync_channel(1);
            let load = Load {
                rank,
                checkpoint: Arc::clone(checkpoint),
                placement: Arc::clone(&placement),
                options: *options,
                loaded: loaded.clone(),
            };
            let answer = answer.clone();
            let body = move || {
                let Some(mut loaded) = load.run(collectives) else { return };
                run_plans(&mut *loaded, &planned, |result| answer.send((rank, result)).is_ok());
            };
            let name = format!("rank-{rank}");
            threads.push(std::thread::Builder::new().name(name).spawn(body).context("cannot start a rank's thread")?);
            plans.push(plan);
        }
        drop(loaded);
        let mut progress = vec![(0, 0); options.workers as usize];
        let mut ready = 0;
        for message in loading {
            match message {
                Loading::Read { rank, done, total } => {
                    progress[rank.index()] = (done, total);
                    let (done, total) = progress.iter().fold((0, 0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
                    on_progress(done, total);
                }
                Loading::Ready => ready += 1,
                Loading::Failed { rank, why } => return Err(anyhow!(why).context(format!("rank {rank} does not load"))),
            }
        }
        anyhow::ensure!(ready == options.workers, "a rank died while loading");
        // Everything is computed: what is measured or proved here is the work itself. A GPU alone has its next step before
        // it is done with one, as it would behind a coordinator; elsewhere nothing is gained by it.
        let depth = if options.workers == 1 && options.device.processor != Processor::Cpu { 2 } else { 1 };
        let engine = EngineConfig::new(config, options.limits, options.workers);
        // Whoever measures or proves submits all at once.
        let (queue_max, queue_tokens_max) = (usize::MAX, u64::MAX);
        let engine = EngineConfig { depth, prefix_cache: false, queue_max, queue_tokens_max, ..engine };
        let engine = Engine::new(engine, Fence::default());
        Ok(Self { engine, plans, answers, threads, totals: Totals::default() })
    }

    /// Takes a request.
    ///
    /// # Errors
    /// The engine refuses it.
    pub fn submit(&mut self, request: Request) -> Result<()> {
        Ok(self.engine.submit(request)?)
    }

    /// Bounds the rows of one sequence in one step.
    pub fn set_chunk_max(&mut self, rows: u32) {
        self.engine.set_chunk_max(rows);
    }

    /// Whether sequences stop behind their first token.
    pub const fn hold_answers(&mut self, held: bool) {
        self.engine.hold_answers(held);
    }

    /// Steps until every request has ended or, while answers are held, has its first token.
    ///
    /// # Errors
    /// A step failed on some rank.
    pub fn run(&mut self, mut on_event: impl FnMut(Event)) -> Result<()> {
        self.run_while(|event| {
            on_event(event);
            true
        })
    }

    /// Runs until there is nothing left to do, or behind the step in which `on_event` first returned false, and those that
    /// were under way then.
    ///
    /// # Errors
    /// A step failed; the cell is then of no more use.
    pub fn run_while(&mut self, mut on_event: impl FnMut(Event) -> bool) -> Result<()> {
        let (mut wanted, mut under_way) = (true, 0);
        loop {
            while wanted && let Some(plans) = self.engine.plan() {
                under_way += 1;
                for (rank, plan) in self.plans.iter().zip(plans) {
                    rank.send(plan).map_err(|_| anyhow!("a rank's thread has ended"))?;
                }
            }
            if under_way == 0 {
                return Ok(());
            }
            for _ in 0..self.plans.len() {
                let (rank, result) = self.answers.recv().map_err(|_| anyhow!("all ranks' threads have ended"))?;
                let result = result.with_context(|| format!("rank {rank}"))?;
                self.totals.exchange += result.exchange;
                for phase in phalanx_proto::Phase::ALL {
                    self.totals.phases.add(phase, result.phases.get(phase));
                }
                for event in self.engine.apply(result)? {
                    wanted &= on_event(event);
                }
            }
            under_way -= 1;
            self.totals.steps += 1;
        }
    }

    /// Sums over all steps since this was asked for last.
    pub fn take_totals(&mut self) -> Totals {
        std::mem::take(&mut self.totals)
    }
}

impl Drop for LocalCell {
    fn drop(&mut self) {
        self.plans.clear();
        for thread in self.threads.drain(..) {
            // A rank that panicked has already said so.
            drop(thread.join());
        }
    }
}

/// Runs a rank's plans in their order, and tells each one's result, until nobody sends or hears any more. A plan that is
/// there before the last one is done is begun before that one's result is waited for.
fn run_plans(
    rank: &mut dyn LoadedRank,
    plans: &Receiver<StepPlan>,
    tell: impl Fn(Result<StepResult, StepError>) -> bool,
) {
    let mut under_way = None;
    loop {
        let next = if under_way.is_some() { plans.try_recv() } else { plans.recv().map_err(Into::into) };
        if matches!(next, Err(TryRecvError::Empty)) && !rank.is_done() {
            std::thread::yield_now();
            continue;
        }
        let begun = next.as_ref().map(|plan| (plan.header.fence, rank.begin(plan, &())));
        if let Some(before) = under_way.take()
            && !tell(rank.finish(before))
        {
            return;
        }
        match begun {
            Ok((fence, Ok(()))) => under_way = Some(fence),
            Ok((_, Err(refused))) => {
                if !tell(Err(refused)) {
                    return;
                }
            }
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {}
        }
    }
}

enum Loading {
    Read { rank: Rank, done: u64, total: u64 },
    Ready,
    Failed { rank: Rank, why: String },
}

struct Load {
    rank: Rank,
    checkpoint: Arc<Checkpoint>,
    placement: Arc<Placement>,
    options: CellOptions,
    loaded: std::sync::mpsc::Sender<Loading>,
}

impl Load {
    fn run(self, collectives: Local) -> Option<Box<dyn LoadedRank>> {
        let Self { rank, checkpoint, placement, options, loaded } = self;
        // Nobody listens any more when another rank has failed.
        let say = |message| drop(loaded.send(message));
        let (ranks, limits) = (options.workers, options.limits);
        let share = Share { checkpoint: &checkpoint, placement: &placement, rank, ranks, limits };
        let mut on_stage = |_, done, total| say(Loading::Read { rank, done, total });
        match LoadedModel::load(&options.device.of(rank.0), share, &mut on_stage) {
            Ok(model) => {
                say(Loading::Ready);
                Some(model.join(collectives, limits, Fence::default()))
            }
            Err(error) => {
                say(Loading::Failed { rank, why: error.to_string() });
                None
            }
        }
    }
}
