//! Ranks that compute on GPUs, with the kernels of `csrc/` on the CPU in place of a GPU: what is proved is everything but
//! the driver and the hardware.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;

use phalanx::local::{CellOptions, LocalCell};
use phalanx_kernels::Backend;
use phalanx_kernels::KernelError;
use phalanx_kernels::cuda::{self, Emulated, Family, Meter};
use phalanx_model::packed::{PackedFile, Stored};
use phalanx_model::{Checkpoint, GptOss};
use phalanx_planner::{Engine, EngineConfig, Event, Want};
use phalanx_proto::memory::Use;
use phalanx_proto::{
    BackendReport, Bytes, CellId, DenseType, Epoch, Fence, Layout, MemoryPlan, MemoryRefused, Peers, Placement,
    Precision, Rank, Scratch, SeqId, StepHeader, StepId, StepPlan, Term,
};
use phalanx_wire::{Prepare, StepFailure};
use phalanx_worker::collectives::local;
use phalanx_worker::collectives::tcp::Listener;
use phalanx_worker::device::{Device, GpuReport, Gpus, Processor};
use phalanx_worker::host::ModelHost;
use phalanx_worker::rank::LoadedModel;
use phalanx_worker::service::{Host, NoResult};
use phalanx_worker::tenure::Tenure;
use support::golden::{Golden, assert_close, assert_like_bf16};
use support::{Given, Setup, bits, fixture, request, run};

/// A machine whose GPUs are emulated.
#[derive(Debug)]
struct EmulatedGpus {
    device: Emulated,
    free: Bytes,
}

static GPUS: EmulatedGpus = EmulatedGpus {
    device: Emulated { fault: None, largest: None, meter: None, family: Family::Mma, beside: 0 },
    free: Bytes(8 << 30),
};

/// The same with Hopper's kernels.
static HOPPERS: EmulatedGpus = EmulatedGpus {
    device: Emulated { fault: None, largest: None, meter: None, family: Family::Wgmma, beside: 2 },
    free: Bytes(8 << 30),
};

impl Gpus for EmulatedGpus {
    fn look(&self, index: u32) -> Result<GpuReport, KernelError> {
        Ok(GpuReport {
            arch: "emulated".to_owned(),
            family: self.device.family,
            free: self.free,
            memory_pool: format!("gpu/{index}"),
        })
    }

    fn open(&self, _index: u32, _on_progress: &mut dyn FnMut(u64, u64)) -> Result<Arc<dyn cuda::Device>, KernelError> {
        Ok(Arc::new(self.device))
    }
}

/// A machine of its own whose GPUs have a meter.
fn metered(family: Family, launches: u64) -> (&'static EmulatedGpus, &'static Meter) {
    let meter: &'static Meter = Box::leak(Box::new(Meter::new(launches)));
    let device = Emulated { meter: Some(meter), family, ..Emulated::default() };
    (Box::leak(Box::new(EmulatedGpus { device, ..GPUS })), meter)
}

fn small(workers: u32, precision: Precision) -> Setup {
    Setup { precision, dense: DenseType::Bf16, seqs_max: 4, step_rows: 64, kv_tokens: 512, ..Setup::exact(workers) }
}

/// The cell of a setup on GPUs.
fn on(gpus: &'static dyn Gpus, setup: Setup, checkpoint: &Checkpoint) -> CellOptions {
    let options = setup.options(checkpoint);
    let processor = Processor::Cuda { first: 0, count: 2 };
    CellOptions { device: Device { processor, gpus, ..options.device }, ..options }
}

fn start(gpus: &'static dyn Gpus, setup: Setup, checkpoint: &Arc<Checkpoint>) -> anyhow::Result<LocalCell> {
    LocalCell::start(checkpoint, &on(gpus, setup, checkpoint), |_, _| ())
}

fn open(name: &str) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(&fixture(name)).unwrap())
}

fn prompt(checkpoint: &Checkpoint, n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 2_654_435 + n) % checkpoint.config().vocab).collect()
}

#[test]
fn the_bits_do_not_depend_on_workers_chunks_or_company() {
    for (gpus, name, precision) in [
        (&GPUS, "tiny-a", Precision::Exact),
        (&GPUS, "tiny-a", Precision::Fast),
        (&GPUS, "tiny-b", Precision::Fast),
        (&HOPPERS, "tiny-a", Precision::Fast),
    ] {
        let checkpoint = open(name);
        let mut base = None;
        for (workers, chunk) in [(1, 64), (2, 64), (4, 5)] {
            let mut cell = start(gpus, small(workers, precision), &checkpoint).unwrap();
            cell.set_chunk_max(chunk);
            let logits = [1, 20].map(|n| request(u64::from(n), &prompt(&checkpoint, n), 0, Want::Logits));
            let greedy = [request(50, &prompt(&checkpoint, 9), 6, Want::Tokens)];
            let given = run(&mut cell, logits.into_iter().chain(greedy));
            let exchanged = cell.take_totals().exchange;
            assert_eq!((exchanged.dispatch_rows > 0, exchanged.bytes_sent > 0), (workers > 1, workers > 1));
            let logits: Vec<Vec<u32>> = given.logits.values().map(|logits| bits(logits)).collect();
            assert!(logits.len() == 2 && given.tokens[&SeqId(50)].len() == 6);
            let base = base.get_or_insert_with(|| (logits.clone(), given.tokens.clone()));
            assert!((logits, given.tokens) == *base, "{name}, {precision}, {workers} workers, chunks of {chunk}");
        }
    }
}

#[test]
fn exact_logits_match_the_golden_ones() {
    for name in ["tiny-a", "tiny-b"] {
        let golden = Golden::open(name);
        let mut cell = start(&GPUS, small(1, Precision::Exact), &golden.checkpoint).unwrap();
        for n in [7, 33] {
            let given = run(&mut cell, [request(n as u64, golden.prompt(n), 0, Want::Logits)]);
            assert_close(&golden, &format!("p{n}"), &given.logits[&SeqId(n as u64)]);
        }
    }
}

#[test]
fn fast_stays_within_the_limits_of_a_bf16_engine() {
    for (gpus, name) in [(&GPUS, "tiny-a"), (&GPUS, "tiny-b"), (&HOPPERS, "tiny-a"), (&HOPPERS, "tiny-b")] {
        let golden = Golden::open(name);
        let mut cell = start(gpus, small(1, Precision::Fast), &golden.checkpoint).unwrap();
        assert_like_bf16(&golden, &mut cell, &[7, 33]);
    }
}

/// Packing needs the layout alone; what is packed into a file is mapped and copied to the device.
#[test]
fn packed_weights_give_the_same_bits() {
    let checkpoint = open("tiny-a");
    let setup = small(1, Precision::Fast);
    let options = on(&GPUS, setup, &checkpoint);
    let config = checkpoint.config();
    let layout = Layout::new(1, 0).unwrap();
    let placement = Placement::contiguous(config.layers.len() as u32, config.experts, layout);
    let folder = tempfile::tempdir().unwrap();
    let backend = || options.device.cuda(&mut |_, _| ()).unwrap();
    let path = folder.path().join(format!("{}.weights", backend().packing()));
    let (built, packed_here) = PackedFile::build(&mut backend(), &checkpoint, &path, &mut |_, _| ()).unwrap();
    assert!(packed_here);
    let given = [None, Some(&built)].map(|packed| {
        let stored = Stored { checkpoint: &checkpoint, packed };
        let limits = options.limits;
        let model = GptOss::load(backend(), stored, &placement, Rank(0), 1, &limits, &mut |_, _| ()).unwrap();
        let mut rank = LoadedModel::Cuda(Box::new(model)).join(local::group(1).remove(0), limits, Fence::default());
        let mut engine =
            Engine::new(EngineConfig { depth: 1, ..EngineConfig::new(config, limits, 1) }, Fence::default());
        engine.submit(request(1, &prompt(&checkpoint, 9), 0, Want::Logits)).unwrap();
        let result = rank.run(&engine.plan().unwrap()[0], &()).unwrap();
        bits(&result.rows[0].logits)
    });
    assert!(given[0].len() == 9 * config.vocab as usize && given[0] == given[1]);
}

/// A rank takes what is planned for it at once, and nothing beyond.
#[test]
fn no_more_memory_is_held_than_planned_and_little_less() {
    for (name, precision, workers, family) in [
        ("tiny-a", Precision::Exact, 1, Family::Mma),
        ("tiny-b", Precision::Fast, 2, Family::Mma),
        ("tiny-b", Precision::Fast, 1, Family::Wgmma),
        ("tiny-b", Precision::Fast, 2, Family::Wgmma),
    ] {
        let checkpoint = open(name);
        let (gpus, meter) = metered(family, u64::MAX);
        let setup = Setup { step_rows: 16, kv_tokens: 256, ..small(workers, precision) };
        let options = on(gpus, setup, &checkpoint);
        let config = checkpoint.config();
        let layout = Layout::new(workers, 0).unwrap();
        let placement = Placement::contiguous(config.layers.len() as u32, config.experts, layout);
        let backend = options.device.look(&checkpoint).unwrap().backend;
        let of_rank = |rank, backend: &BackendReport| {
            let plan = MemoryPlan::new(config, layout, &placement, rank, &options.limits, backend);
            plan.total().0 - plan.of(Use::Process).0
        };
        let planned: u64 = layout.ranks().map(|rank| of_rank(rank, &backend)).sum();
        let mut cell = LocalCell::start(&checkpoint, &options, |_, _| ()).unwrap();
        let requests = [40, 30, 20, 10].map(|n| request(u64::from(n), &prompt(&checkpoint, n), 4, Want::Tokens));
        run(&mut cell, requests);
        let (held, borders) = (meter.peak(), u64::from(workers) * 256);
        assert!((planned..planned + borders).contains(&held), "{name}: {held} of {planned} bytes");
        assert!(backend.scratch.fixed.0 < 300 << 20);

        // What a rank holds before its first step: what is planned, but for what the backend makes for itself.
        let (stored, limits) = (Stored { checkpoint: &checkpoint, packed: None }, options.limits);
        let empty = options.device.cuda(&mut |_, _| ()).unwrap();
        let model = GptOss::load(empty, stored, &placement, Rank(0), workers, &limits, &mut |_, _| ()).unwrap();
        let bare = BackendReport { scratch: Scratch::default(), peers: Peers::default(), ..backend };
        let (held, planned) = (model.allocated(), of_rank(Rank(0), &bare));
        println!("{name}: {held} bytes held, {planned} planned");
        assert!(held > planned / 2 && held < 2 * planned, "{name}: {held} of {planned} bytes");
    }
}

#[test]
fn what_does_not_fit_is_refused_before_and_said_at_once() {
    let checkpoint = open("tiny-a");
    let gpus: &'static EmulatedGpus = Box::leak(Box::new(EmulatedGpus { free: Bytes(1600 << 20), ..GPUS }));
    let refused = start(gpus, small(1, Precision::Fast), &checkpoint).err().unwrap();
    assert!(refused.downcast_ref::<MemoryRefused>().is_some(), "{refused}");
    // The driver said that there is memory, and has none in one piece.
    let device = Emulated { largest: Some(40 << 10), ..Emulated::default() };
    let gpus: &'static EmulatedGpus = Box::leak(Box::new(EmulatedGpus { device, ..GPUS }));
    let failed = format!("{:#}", start(gpus, small(1, Precision::Fast), &checkpoint).err().unwrap());
    assert!(failed.contains("rank 0 does not load") && failed.contains("the device cannot allocate"), "{failed}");
}

#[test]
fn a_device_that_fails_in_a_step_ends_it_on_every_rank() {
    let checkpoint = open("tiny-a");
    for workers in [1, 2] {
        let (gpus, meter) = metered(Family::Mma, u64::MAX);
        let mut cell = start(gpus, small(workers, Precision::Fast), &checkpoint).unwrap();
        run(&mut cell, [request(1, &prompt(&checkpoint, 5), 2, Want::Tokens)]);
        meter.leave(10);
        cell.submit(request(2, &prompt(&checkpoint, 5), 2, Want::Tokens)).unwrap();
        let error = format!("{:#}", cell.run(|_| ()).unwrap_err());
        let (failed, noticed) = (error.contains("the device is broken"), error.contains("its thread has ended"));
        assert!(failed || workers > 1 && noticed, "{error}");
    }
}

/// Steps two hosts, each on a thread of its own, as a coordinator does.
fn step(hosts: &mut [ModelHost], plans: Vec<StepPlan>) -> Vec<Result<phalanx_proto::StepResult, NoResult>> {
    std::thread::scope(|scope| {
        let steps: Vec<_> =
            hosts.iter_mut().zip(plans).map(|(host, plan)| scope.spawn(move || host.run(&plan))).collect();
        steps.into_iter().map(|step| step.join().unwrap()).collect()
    })
}

/// Hosts whose GPUs these are, joined over TCP, and an engine that plans for them.
fn hosts(gpus: &[&'static EmulatedGpus], setup: Setup, checkpoint: &Arc<Checkpoint>) -> (Vec<ModelHost>, Engine) {
    let listen = || Listener::bind("127.0.0.1:0".parse().unwrap(), None).unwrap();
    let options = on(&GPUS, setup, checkpoint);
    let (device, limits, config) = (options.device, options.limits, checkpoint.config());
    let host = |&gpus: &&'static EmulatedGpus| {
        ModelHost::new(checkpoint.clone(), Device { gpus, ..device }, listen()).unwrap()
    };
    let mut hosts: Vec<ModelHost> = gpus.iter().map(host).collect();
    let layout = Layout::new(setup.workers, 0).unwrap();
    let placement = Placement::contiguous(config.layers.len() as u32, config.experts, layout);
    let fence = Fence { term: Term(1), epoch: Epoch(1), step: StepId(0) };
    let peers: Vec<SocketAddr> = hosts.iter().map(|host| host.describe().data_address).collect();
    std::thread::scope(|scope| {
        for (rank, host) in (0..).map(Rank).zip(&mut hosts) {
            let (placement, peers) = (placement.clone(), peers.clone());
            let prepare = Prepare { fence, cell: CellId(0), rank, layout, placement, limits, peers };
            scope.spawn(move || assert!(host.prepare(&prepare, &Tenure::default(), &|_| ()).unwrap() > 0));
        }
    });
    let engine = EngineConfig { depth: 1, prefix_cache: false, ..EngineConfig::new(config, limits, setup.workers) };
    (hosts, Engine::new(engine, fence))
}

fn failures(outcomes: Vec<Result<phalanx_proto::StepResult, NoResult>>) -> Vec<StepFailure> {
    let failure = |outcome| match outcome {
        Err(NoResult::Failed(failure)) => failure,
        other => panic!("{other:?}"),
    };
    outcomes.into_iter().map(failure).collect()
}

#[test]
fn a_device_that_hangs_fails_its_rank_within_the_steps_deadline() {
    let checkpoint = open("tiny-a");
    for workers in [1, 2] {
        let (gpus, meter) = metered(Family::Mma, u64::MAX);
        let machines = [gpus, &GPUS];
        let setup = small(workers, Precision::Fast);
        let (mut hosts, mut engine) = hosts(&machines[..workers as usize], setup, &checkpoint);
        engine.submit(request(1, &prompt(&checkpoint, 9), 3, Want::Tokens)).unwrap();
        for result in step(&mut hosts, engine.plan().unwrap()) {
            engine.apply(result.unwrap()).unwrap();
        }
        meter.hang();
        let mut plans = engine.plan().unwrap();
        for plan in &mut plans {
            plan.header = StepHeader { deadline_ms: 50, ..plan.header.clone() };
        }
        if workers == 1 {
            // As the service does it: it waits for a step only once it is done, or late.
            hosts[0].begin(&plans[0]).unwrap();
            while !hosts[0].is_done() {
                std::thread::yield_now();
            }
        }
        let failures = failures(step(&mut hosts, plans));
        assert!(failures[0].message.contains("in time"), "{}", failures[0].message);
        assert!(failures.iter().all(|failure| failure.blamed == [Rank(0)]), "{failures:?}");
        // Giving back what it holds waits for nothing either.
        hosts.iter_mut().for_each(ModelHost::release);
    }
}

#[test]
fn hosts_exchange_rows_over_tcp_and_tell_who_failed() {
    let checkpoint = open("tiny-a");
    let setup = small(2, Precision::Fast);
    let base = {
        let mut cell = start(&GPUS, Setup { workers: 1, ..setup }, &checkpoint).unwrap();
        run(&mut cell, [request(1, &prompt(&checkpoint, 9), 3, Want::Tokens)])
    };

    // The second host's device can be broken.
    let (gpus, meter) = metered(Family::Mma, u64::MAX);
    let (mut hosts, mut engine) = hosts(&[&GPUS, gpus], setup, &checkpoint);
    let described = hosts[0].describe();
    assert!(described.numerics.0.starts_with("cuda-smemulated-"), "{}", described.numerics);
    assert_eq!((described.memory_pool.as_str(), described.backend.memory), ("gpu/0", GPUS.free));

    engine.submit(request(1, &prompt(&checkpoint, 9), 3, Want::Tokens)).unwrap();
    let mut given = Given::default();
    while let Some(plans) = engine.plan() {
        for result in step(&mut hosts, plans) {
            for event in engine.apply(result.unwrap()).unwrap() {
                if let Event::Token { seq, token, .. } = event {
                    given.tokens.entry(seq).or_default().push(token.0);
                }
            }
        }
    }
    assert_eq!(given, base);

    // Slots for exchanges are among what was planned; they are there before it is known what carries the rows.
    let config = checkpoint.config();
    let layout = Layout::new(2, 0).unwrap();
    let placement = Placement::contiguous(config.layers.len() as u32, config.experts, layout);
    let (limits, backend) = (setup.options(&checkpoint).limits, hosts[1].describe().backend);
    let plan = MemoryPlan::new(config, layout, &placement, Rank(1), &limits, &backend);
    let planned = plan.total().0 - plan.of(Use::Process).0;
    assert!(plan.of(Use::Process).0 > backend.process_base.0 && backend.peers.slots.0 > 0);
    assert!((planned..planned + 256).contains(&meter.peak()), "{} of {planned}", meter.peak());

    engine.submit(request(2, &prompt(&checkpoint, 9), 3, Want::Tokens)).unwrap();
    meter.leave(10);
    let outcomes = step(&mut hosts, engine.plan().unwrap());
    let failures = failures(outcomes);
    assert!(failures[1].message.contains("the device is broken"), "{}", failures[1].message);
    assert!(failures.iter().all(|failure| failure.blamed == [Rank(1)]), "{failures:?}");
}
