//! NCCL's functions, looked up one by one in the library that is there.
//!
//! Types are `cudarc`'s; its functions are not used. They panic where the library or a function is missing, look for
//! no library named `libnccl.so.2`, and read results as an enumeration, which a newer library may leave.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclUniqueId};
use phalanx_kernels::cuda::libraries::{Library, Missing};

/// What an NCCL function answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub c_int);

impl Code {
    /// All is done.
    pub const SUCCESS: Self = Self(0);
    /// Another rank or the network failed.
    pub const REMOTE_ERROR: Self = Self(6);
    /// The call goes on in the background.
    pub const IN_PROGRESS: Self = Self(7);

    /// Neither done nor under way.
    #[must_use]
    pub fn is_failure(self) -> bool {
        self != Self::SUCCESS && self != Self::IN_PROGRESS
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 8] = [
            "success",
            "unhandled CUDA error",
            "system error",
            "internal error",
            "invalid argument",
            "invalid usage",
            "remote error",
            "in progress",
        ];
        match usize::try_from(self.0).ok().and_then(|code| NAMES.get(code)) {
            Some(name) => f.write_str(name),
            None => write!(f, "code {}", self.0),
        }
    }
}

/// The bytes that ranks of one communicator have in common; as good as an address to whoever may join.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId(pub [u8; UniqueId::BYTES]);

impl UniqueId {
    /// Bytes of an id.
    pub const BYTES: usize = 128;

    pub(super) fn raw(self) -> ncclUniqueId {
        ncclUniqueId { internal: self.0.map(|byte| c_char::from_ne_bytes([byte])) }
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an id")
    }
}

/// NCCL's functions, as nccl.h declares them, results as integers.
pub(super) struct Table {
    pub(super) get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    pub(super) init: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> c_int,
    pub(super) async_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    pub(super) abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub(super) finalize: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub(super) destroy: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub(super) group_start: unsafe extern "C" fn() -> c_int,
    pub(super) group_end: unsafe extern "C" fn() -> c_int,
    pub(super) send: unsafe extern "C" fn(*const c_void, usize, c_uint, c_int, ncclComm_t, cudaStream_t) -> c_int,
    pub(super) receive: unsafe extern "C" fn(*mut c_void, usize, c_uint, c_int, ncclComm_t, cudaStream_t) -> c_int,
    pub(super) all_gather:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_uint, ncclComm_t, cudaStream_t) -> c_int,
    /// Since 2.27: the communicator, ranks to leave out and how many, the new one, its configuration, flags.
    pub(super) shrink: Option<Shrink>,
}

pub(super) type Shrink =
    unsafe extern "C" fn(ncclComm_t, *mut c_int, c_int, *mut ncclComm_t, *mut ncclConfig_t, c_int) -> c_int;

/// `ncclUint8`: bytes are moved, never added.
pub(super) const BYTES: c_uint = 1;
/// `NCCL_SHRINK_ABORT`: what is under way on the old communicator is given up.
pub(super) const SHRINK_ABORT: c_int = 1;

/// The functions of the NCCL that is there.
#[derive(Clone, Copy)]
pub struct Api(pub(super) &'static Table);

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NCCL")
    }
}

impl Api {
    /// The library of this machine.
    ///
    /// # Errors
    /// It is missing, or lacks a function.
    pub fn load() -> Result<Self, Missing> {
        static TABLE: OnceLock<Result<Table, Missing>> = OnceLock::new();
        TABLE.get_or_init(Table::load).as_ref().map(Self).map_err(|missing| *missing)
    }

    /// An id for a new communicator, for one rank to make and all to know.
    ///
    /// # Errors
    /// NCCL finds no network interface to listen on.
    pub fn unique_id(self) -> Result<UniqueId, Code> {
        let mut id = ncclUniqueId { internal: [0; UniqueId::BYTES] };
        // SAFETY: the function fills the id it is given.
        let code = Code(unsafe { (self.0.get_unique_id)(&mut id) });
        if code == Code::SUCCESS { Ok(UniqueId(id.internal.map(|byte| byte.to_ne_bytes()[0]))) } else { Err(code) }
    }

    /// Whether a communicator can go on without some of its ranks.
    #[must_use]
    pub const fn can_shrink(self) -> bool {
        self.0.shrink.is_some()
    }
}

impl Table {
    fn load() -> Result<Self, Missing> {
        let library = Library::Nccl;
        // SAFETY: the types are those of nccl.h; an enumeration there is an unsigned integer.
        unsafe {
            Ok(Self {
                get_unique_id: library.function("ncclGetUniqueId")?,
                init: library.function("ncclCommInitRankConfig")?,
                async_error: library.function("ncclCommGetAsyncError")?,
                abort: library.function("ncclCommAbort")?,
                finalize: library.function("ncclCommFinalize")?,
                destroy: library.function("ncclCommDestroy")?,
                group_start: library.function("ncclGroupStart")?,
                group_end: library.function("ncclGroupEnd")?,
                send: library.function("ncclSend")?,
                receive: library.function("ncclRecv")?,
                all_gather: library.function("ncclAllGather")?,
                shrink: library.function("ncclCommShrink").ok(),
            })
        }
    }
}

/// How a communicator is made: calls never block, and `channels_max` bounds the GPU's multiprocessors that it takes.
pub(super) fn config(channels_max: Option<u32>) -> ncclConfig_t {
    const UNSET: c_int = c_int::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        // The bindings' header; a library copies as much of the structure as both know.
        version: 23_003,
        blocking: 0,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: channels_max.and_then(|channels| c_int::try_from(channels).ok()).unwrap_or(UNSET),
        netName: std::ptr::null(),
        splitShare: UNSET,
        trafficClass: UNSET,
        commName: c"phalanx".as_ptr(),
        collnetEnable: UNSET,
        CTAPolicy: UNSET,
        shrinkShare: UNSET,
        nvlsCTAs: UNSET,
        nChannelsPerNetPeer: UNSET,
        nvlinkCentricSched: UNSET,
        graphUsageMode: UNSET,
        numRmaCtx: UNSET,
        maxP2pPeers: UNSET,
    }
}
