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
mod hostile;
mod layer;
mod memory;
mod plans;
mod rows;
mod sampling;
mod tolerances;

use phalanx_kernels::{Backend, Cpu, CpuOptions, DenseFormat, HostParts, Isa, Precision, Reference};

/// A backend whose exchange buffers the host can read.
trait Tested: Backend<Parts = HostParts> {}

impl<B: Backend<Parts = HostParts>> Tested for B {}

/// Makes backends of one kind and precision.
struct Make<B> {
    name: String,
    precision: Precision,
    dense: DenseFormat,
    make: Box<dyn Fn() -> B>,
}

impl<B> Make<B> {
    fn backend(&self) -> B {
        (self.make)()
    }
}

/// What is rounded: everything as users can have it.
const KINDS: [(Precision, DenseFormat); 3] =
    [(Precision::Exact, DenseFormat::Bf16), (Precision::Fast, DenseFormat::Bf16), (Precision::Fast, DenseFormat::Q8)];

fn cpu(isa: Isa, (precision, dense): (Precision, DenseFormat), threads: usize) -> Cpu {
    Cpu::new(CpuOptions { precision, dense, threads, pin: None, isa: Some(isa) }).unwrap()
}

fn references() -> Vec<Make<Reference>> {
    let make = |(precision, dense)| Make {
        name: format!("reference {precision:?} {dense:?}"),
        precision,
        dense,
        make: Box::new(move || Reference::new(precision, dense)),
    };
    KINDS.map(make).into()
}

fn cpus() -> Vec<Make<Cpu>> {
    let kinds = Isa::available().into_iter().flat_map(|isa| KINDS.map(|kind| (isa, kind)));
    let make = |(isa, kind): (Isa, (Precision, DenseFormat))| Make {
        name: format!("cpu {} {kind:?}", isa.name()),
        precision: kind.0,
        dense: kind.1,
        make: Box::new(move || cpu(isa, kind, 2)),
    };
    kinds.map(make).collect()
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
        }
    };
}

conformance!(
    rows::embeds_given_and_sampled_tokens,
    rows::gathers,
    rows::norms,
    rows::projects,
    rows::stacks_matrices,
    rows::adds_a_projection,
    attention::rotates,
    attention::attends_from_the_first_position_on,
    attention::attends_at_window_edges,
    attention::attends_with_any_heads,
    attention::attends_far_beyond_the_original_context,
    attention::attends_to_the_sink_alone,
    attention::copies_blocks,
    experts::routes,
    experts::dispatches,
    experts::works_for_every_rank,
    experts::clamps,
    experts::scales_at_both_ends,
    experts::combines,
    sampling::takes_the_largest,
    sampling::draws_by_the_inverse_distribution,
    sampling::keeps_the_nucleus,
    sampling::keeps_what_is_asked_for,
    sampling::reports_logprobs_of_the_row_as_it_was,
    sampling::survives_what_nobody_should_ask,
    hostile::refuses_damaged_tensors,
    hostile::refuses_damaged_records,
    contract::rows_alone_or_together,
    contract::chunks_of_any_size,
    contract::steps_without_rows,
);
