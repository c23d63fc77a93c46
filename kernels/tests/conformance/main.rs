//! Every op of every backend against the reference functions, at named boundaries; and the numeric contract:
//! a row's bits depend on the row alone.
//!
//! A check is generic over the backend. To bring another backend under the suite, add a module to
//! [`backends`] with one constructor.

#![allow(clippy::unwrap_used, reason = "tests")]

mod attention;
mod compare;
mod contract;
mod data;
mod experts;
mod faults;
mod graphs;
mod hangs;
mod hostile;
mod layer;
mod memory;
mod operand;
mod plans;
mod rows;
mod sampling;
mod slots;
mod tolerances;
mod widths;

use std::sync::{Arc, OnceLock};

use operand::Operand;
use phalanx_kernels::cuda::compile::Cache;
use phalanx_kernels::cuda::driver::Driver;
use phalanx_kernels::cuda::{Device as _, Emulated, Family};
use phalanx_kernels::{Backend, Cpu, CpuOptions, Cuda, DenseFormat, HostParts, Isa, Precision, Reference};

/// A backend whose exchange buffers the host can read and write.
trait Tested: Backend {
    /// What the buffers hold.
    fn download(&mut self, parts: &Self::Parts) -> HostParts;

    /// Buffers that hold these bytes.
    fn upload(&mut self, parts: &HostParts) -> Self::Parts;
}

impl Tested for Reference {
    fn download(&mut self, parts: &HostParts) -> HostParts {
        parts.clone()
    }

    fn upload(&mut self, parts: &HostParts) -> HostParts {
        parts.clone()
    }
}

impl Tested for Cpu {
    fn download(&mut self, parts: &HostParts) -> HostParts {
        parts.clone()
    }

    fn upload(&mut self, parts: &HostParts) -> HostParts {
        parts.clone()
    }
}

impl Tested for Cuda {
    fn download(&mut self, parts: &Self::Parts) -> HostParts {
        parts.download().unwrap()
    }

    fn upload(&mut self, parts: &HostParts) -> Self::Parts {
        let mut uploaded = self.parts(parts.by_rank.len(), parts.by_rank.iter().map(Vec::len).sum());
        uploaded.upload(parts).unwrap();
        uploaded
    }
}

/// Makes backends of one kind and precision.
struct Make<B> {
    name: String,
    precision: Precision,
    dense: DenseFormat,
    /// What rows are where they meet projections, attention's keys and values, and experts; and what keys and values are.
    projection: Operand,
    attention: Operand,
    keys: Operand,
    expert: Operand,
    make: Box<dyn Fn() -> B>,
}

impl<B> Make<B> {
    fn backend(&self) -> B {
        (self.make)()
    }
}

const PRECISIONS: [Precision; 2] = [Precision::Exact, Precision::Fast];

/// What is rounded: everything as users can have it. CUDA devices hold dense weights in bf16 alone.
const KINDS: [(Precision, DenseFormat); 3] =
    [(Precision::Exact, DenseFormat::Bf16), (Precision::Fast, DenseFormat::Bf16), (Precision::Fast, DenseFormat::Q8)];

fn cpu(isa: Isa, (precision, dense): (Precision, DenseFormat), threads: usize) -> Cpu {
    Cpu::new(CpuOptions { precision, dense, threads, pin: None, isa: Some(isa) }).unwrap()
}

fn references() -> [Make<Reference>; 3] {
    let make = |kind: (Precision, DenseFormat)| Make {
        name: format!("reference {kind:?}"),
        precision: kind.0,
        dense: kind.1,
        projection: Operand::of_cpu_projections(kind.1),
        attention: Operand::Whole,
        keys: Operand::of_cpu_keys(kind.0),
        expert: Operand::of_cpu_experts(kind.0),
        make: Box::new(move || Reference::new(kind.0, kind.1)),
    };
    KINDS.map(make)
}

fn make_cpu(isa: Isa, kind: (Precision, DenseFormat), threads: usize) -> Make<Cpu> {
    Make {
        name: format!("cpu {} {kind:?} with {threads} threads", isa.name()),
        precision: kind.0,
        dense: kind.1,
        projection: Operand::of_cpu_projections(kind.1),
        attention: Operand::Whole,
        keys: Operand::of_cpu_keys(kind.0),
        expert: Operand::of_cpu_experts(kind.0),
        make: Box::new(move || cpu(isa, kind, threads)),
    }
}

/// A device with Hopper's own instructions.
/// Blocks that meet run at once.
const HOPPER: Emulated = Emulated { fault: None, largest: None, family: Family::Wgmma, meter: None, beside: 2 };

/// The CUDA kernels on the CPU.
fn make_cuda(device: Emulated, precision: Precision) -> Make<Cuda> {
    let operand = Operand::of_cuda(precision);
    Make {
        name: format!("cuda {precision:?} by {:?}, emulated", device.family),
        precision,
        dense: DenseFormat::Bf16,
        projection: operand,
        attention: operand,
        keys: operand,
        expert: operand,
        make: Box::new(move || Cuda::new(Arc::new(device), precision).unwrap()),
    }
}

/// The CUDA kernels on the GPU that `PHALANX_GPU` numbers, if it does; it must then be there. It is opened once: that takes
/// longer than most checks.
fn gpus() -> Option<Vec<Make<Cuda>>> {
    static GPU: OnceLock<[Arc<Driver>; 2]> = OnceLock::new();
    let ordinal: usize = std::env::var("PHALANX_GPU").ok()?.parse().unwrap();
    let drivers = GPU.get_or_init(|| {
        let cubins = std::env::var("PHALANX_KERNEL_CACHE").map_or_else(|_| std::env::temp_dir(), Into::into);
        let open = || Driver::open(ordinal, &Cache::new(&cubins), &mut |_, _| ()).unwrap();
        [Arc::new(open().restricted_to(Family::Mma)), Arc::new(open())]
    });
    let kinds = PRECISIONS.map(|precision| (precision, &drivers[0])).into_iter();
    let own = (drivers[1].family() == Family::Wgmma).then_some((Precision::Fast, &drivers[1]));
    let on_gpu = |(precision, driver): (Precision, &Arc<Driver>)| {
        let driver = Arc::clone(driver);
        let name = format!("cuda {precision:?} by {:?} on GPU {ordinal}", driver.family());
        let make = move || Cuda::new(Arc::<Driver>::clone(&driver), precision).unwrap();
        Make { name, make: Box::new(make), ..make_cuda(Emulated::default(), precision) }
    };
    Some(kinds.chain(own).map(on_gpu).collect())
}

/// The CUDA kernels: on a GPU where one is numbered, else emulated.
fn cudas() -> Vec<Make<Cuda>> {
    gpus().unwrap_or_else(|| {
        let emulated = PRECISIONS.map(|precision| make_cuda(Emulated::default(), precision));
        emulated.into_iter().chain([make_cuda(HOPPER, Precision::Fast)]).collect()
    })
}

fn cpus() -> Vec<Make<Cpu>> {
    let kinds = Isa::available().into_iter().flat_map(|isa| KINDS.map(|kind| (isa, kind)));
    kinds.map(|(isa, kind)| make_cpu(isa, kind, 2)).collect()
}

/// A test for each check on each kind of backend.
macro_rules! conformance {
    ($($module:ident :: $check:ident),* $(,)?) => {
        mod backends {
            mod reference {
                $(#[test] fn $check() { crate::references().iter().for_each(crate::$module::$check); })*
            }
            mod cpu {
                $(#[test] fn $check() { crate::cpus().iter().for_each(crate::$module::$check); })*
            }
            mod cuda {
                $(#[test] fn $check() { crate::cudas().iter().for_each(crate::$module::$check); })*
            }
        }
    };
}

conformance!(
    rows::embeds_given_and_sampled_tokens,
    rows::gathers,
    rows::norms,
    rows::projects,
    rows::projects_any_number_of_rows,
    rows::stacks_matrices,
    rows::adds_a_projection,
    attention::rotates,
    attention::attends_from_the_first_position_on,
    attention::attends_at_window_edges,
    attention::attends_with_any_heads,
    attention::attends_far_beyond_the_original_context,
    attention::attends_over_long_pasts,
    attention::attends_to_the_sink_alone,
    attention::copies_blocks,
    experts::routes,
    experts::routes_any_number_of_rows,
    experts::routes_beside_what_is_no_number,
    experts::dispatches,
    experts::works_for_every_rank,
    experts::works_on_any_number_of_rows,
    experts::works_on_few_and_on_many_records,
    experts::works_on_many_slots,
    experts::clamps,
    experts::scales_at_both_ends,
    experts::combines,
    sampling::takes_the_largest,
    sampling::draws_by_the_inverse_distribution,
    sampling::keeps_the_nucleus,
    sampling::keeps_what_is_asked_for,
    sampling::draws_from_long_rows,
    sampling::reports_logprobs_of_the_row_as_it_was,
    sampling::survives_what_nobody_should_ask,
    hostile::refuses_damaged_tensors,
    hostile::refuses_packed_bytes_of_another_size,
    hostile::refuses_damaged_records,
    plans::what_does_not_exist_is_named,
    plans::errors_are_those_of_their_step,
    plans::what_no_row_sees_may_not_exist,
    plans::shapes_that_do_not_fit_are_refused,
    contract::rows_alone_or_together,
    contract::chunks_of_any_size,
    contract::steps_without_rows,
);
