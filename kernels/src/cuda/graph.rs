//! Graphs of the CUDA driver: a chain of kernel, copy and memset nodes, and of graphs that were captured. Some kernels start
//! while the one before them still runs.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::device::{Graph, Launch};
use super::driver::failed;
use super::sequence::{Node, Sequence};
use super::stream::Stream;
use crate::KernelError;

/// A graph, what it was made from, and the stream it is launched on.
#[derive(Debug)]
pub(super) struct Chain {
    stream: Arc<Stream>,
    graph: sys::CUgraph,
    /// Null until the graph is whole.
    exec: sys::CUgraphExec,
    nodes: Vec<Link>,
}

/// A node of the graph.
#[derive(Debug)]
struct Link {
    node: sys::CUgraphNode,
    /// The kernel's; null for all others.
    function: sys::CUfunction,
}

// SAFETY: graphs belong to the context, not to a thread; the driver asks only that no two threads use one at once, which
// `&mut self` sees to, and every method makes the context current first.
unsafe impl Send for Chain {}

impl Chain {
    /// A graph of these nodes; `function` finds a launch's kernel. `ahead`: the device lets kernels start that wait themselves for
    /// the end of the one before.
    pub(super) fn new(
        stream: &Arc<Stream>,
        nodes: &Sequence,
        ahead: bool,
        function: impl Fn(&Launch<'_>, usize) -> Result<sys::CUfunction, KernelError>,
    ) -> Result<Self, KernelError> {
        let make = failed("make a graph");
        stream.bind().map_err(&make)?;
        let mut graph = ptr::null_mut();
        // SAFETY: the handle is written to a place that outlives the call; there are no flags.
        unsafe { sys::cuGraphCreate(&raw mut graph, 0) }.result().map_err(&make)?;
        // From here on dropping it destroys the graph.
        let mut chain =
            Self { stream: Arc::clone(stream), graph, exec: ptr::null_mut(), nodes: Vec::with_capacity(nodes.len()) };
        for node in nodes.nodes() {
            let function = match node {
                Node::Launch(launch, args) => function(&launch, size_of_val(args))?,
                _ => ptr::null_mut(),
            };
            let starts_ahead = matches!(&node, Node::Launch(launch, _) if ahead && launch.kernel.starts_ahead);
            chain.add(node, function, starts_ahead).map_err(&make)?;
        }
        // SAFETY: the graph is valid and whole; no flag is set.
        chain.exec =
            unsafe { result::graph::instantiate(chain.graph, sys::CUgraphInstantiate_flags_enum(0)) }.map_err(&make)?;
        Ok(chain)
    }

    /// Adds a node behind the last one.
    fn add(&mut self, node: Node<'_>, function: sys::CUfunction, starts_ahead: bool) -> Result<(), DriverError> {
        // Only kernels wait themselves, and only for kernels.
        let ahead_of = self.nodes.last().filter(|last| starts_ahead && !last.function.is_null()).map(|last| last.node);
        let behind = self.nodes.last().filter(|_| ahead_of.is_none());
        let before: Vec<sys::CUgraphNode> = behind.map(|last| last.node).into_iter().collect();
        let (graph, context) = (self.graph, self.stream.context().cu_ctx());
        let mut added = ptr::null_mut();
        // SAFETY: the graph is valid, and so is the node before, which is of it; parameters outlive the call and are
        // copied by it, arguments of kernels too.
        let outcome = unsafe {
            match node {
                Node::Launch(launch, args) => {
                    let mut pointers = [args.as_ptr().cast_mut().cast()];
                    let params = kernel_params(&launch, function, &mut pointers);
                    sys::cuGraphAddKernelNode_v2(
                        &raw mut added,
                        graph,
                        before.as_ptr(),
                        before.len(),
                        &raw const params,
                    )
                }
                Node::Copy { from, to, bytes } => {
                    let params = copy_params(from, to, bytes);
                    let params = &raw const params;
                    sys::cuGraphAddMemcpyNode(&raw mut added, graph, before.as_ptr(), before.len(), params, context)
                }
                Node::Zero { to, bytes } => {
                    let params = zero_params(to, bytes);
                    let params = &raw const params;
                    sys::cuGraphAddMemsetNode(&raw mut added, graph, before.as_ptr(), before.len(), params, context)
                }
                Node::Captured(captured) => {
                    // Copied into this graph, with what the library has tied to it.
                    let child = captured.graph().cast();
                    sys::cuGraphAddChildGraphNode(&raw mut added, graph, before.as_ptr(), before.len(), child)
                }
            }
        };
        outcome.result()?;
        if let Some(before) = ahead_of {
            // SAFETY: both nodes are of this graph, are kernels, and have no edge yet; all outlives the call.
            unsafe { sys::cuGraphAddDependencies_v2(graph, &raw const before, &raw const added, &raw const AHEAD, 1) }
                .result()?;
        }
        self.nodes.push(Link { node: added, function });
        Ok(())
    }
}

impl Graph for Chain {
    unsafe fn update(&mut self, at: usize, node: Node<'_>) -> Result<(), KernelError> {
        let change = failed("change a graph");
        self.stream.bind().map_err(&change)?;
        let (exec, context, link) = (self.exec, self.stream.context().cu_ctx(), &self.nodes[at]);
        // SAFETY: the executable graph is valid and was made from a graph that still has this node; the caller promises
        // that it is of the same kind. Parameters outlive the call and are copied by it. Copies and memsets are of one
        // dimension within this context's memory, before and after, as the driver asks.
        let outcome = unsafe {
            match node {
                Node::Launch(launch, args) => {
                    let mut pointers = [args.as_ptr().cast_mut().cast()];
                    let params = kernel_params(&launch, link.function, &mut pointers);
                    sys::cuGraphExecKernelNodeSetParams_v2(exec, link.node, &raw const params)
                }
                Node::Copy { from, to, bytes } => {
                    let params = copy_params(from, to, bytes);
                    sys::cuGraphExecMemcpyNodeSetParams(exec, link.node, &raw const params, context)
                }
                Node::Zero { to, bytes } => {
                    let params = zero_params(to, bytes);
                    sys::cuGraphExecMemsetNodeSetParams(exec, link.node, &raw const params, context)
                }
                // It is the same one.
                Node::Captured(_) => return Ok(()),
            }
        };
        outcome.result().map_err(&change)
    }

    unsafe fn launch(&mut self) -> Result<(), KernelError> {
        let launch = failed("launch a graph");
        self.stream.bind().map_err(&launch)?;
        // SAFETY: the executable graph and the stream are valid; the caller promises that the nodes may run.
        unsafe { result::graph::launch(self.exec, self.stream.raw()) }.map_err(&launch)
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        // Without a context nothing is left to destroy, and nothing can be done about an error.
        if self.stream.bind().is_ok() {
            if !self.exec.is_null() {
                // SAFETY: made by `new`, not used again; the driver keeps what is in flight until it is done.
                let _ = unsafe { result::graph::exec_destroy(self.exec) };
            }
            // SAFETY: made by `new`, not used again.
            let _ = unsafe { result::graph::destroy(self.graph) };
        }
    }
}

/// From a kernel to one that may start once all blocks of the first have said so, and waits for its end itself.
static AHEAD: sys::CUgraphEdgeData = sys::CUgraphEdgeData {
    from_port: sys::CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC as u8,
    to_port: 0,
    type_: sys::CUgraphDependencyType_enum::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC as u8,
    reserved: [0; 5],
};

/// One argument, the kernel's struct, to which `pointers` points.
const fn kernel_params(
    launch: &Launch<'_>,
    function: sys::CUfunction,
    pointers: &mut [*mut c_void; 1],
) -> sys::CUDA_KERNEL_NODE_PARAMS {
    let [x, y, z] = launch.grid;
    sys::CUDA_KERNEL_NODE_PARAMS {
        func: function,
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.kernel.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared,
        kernelParams: pointers.as_mut_ptr(),
        extra: ptr::null_mut(),
        // Ignored where a function is given.
        kern: ptr::null_mut(),
        ctx: ptr::null_mut(),
    }
}

/// One row of `bytes` on the device; pitches count only between rows.
const fn copy_params(from: u64, to: u64, bytes: usize) -> sys::CUDA_MEMCPY3D {
    sys::CUDA_MEMCPY3D {
        srcXInBytes: 0,
        srcY: 0,
        srcZ: 0,
        srcLOD: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: ptr::null(),
        srcDevice: from,
        srcArray: ptr::null_mut(),
        reserved0: ptr::null_mut(),
        srcPitch: 0,
        srcHeight: 0,
        dstXInBytes: 0,
        dstY: 0,
        dstZ: 0,
        dstLOD: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: ptr::null_mut(),
        dstDevice: to,
        dstArray: ptr::null_mut(),
        reserved1: ptr::null_mut(),
        dstPitch: 0,
        dstHeight: 0,
        WidthInBytes: bytes,
        Height: 1,
        Depth: 1,
    }
}

/// One row of `bytes` bytes.
const fn zero_params(to: u64, bytes: usize) -> sys::CUDA_MEMSET_NODE_PARAMS {
    sys::CUDA_MEMSET_NODE_PARAMS { dst: to, pitch: 0, value: 0, elementSize: 1, width: bytes, height: 1 }
}
