//! Whether the ranks of an epoch exchange over NCCL: each says what it can do, and all decide alike by what all say.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use phalanx_kernels::HostParts;
use phalanx_kernels::cuda::Port;
use phalanx_kernels::cuda::libraries::{Library, Version};
use phalanx_model::{CollectiveError, Collectives, Exchange, ExchangeKind};
use phalanx_proto::{Fence, LayerIdx, Rank};

use super::table::Api;
use crate::collectives::tcp::Tcp;

/// The oldest NCCL that is used.
const OLDEST: Version = Version::packed(21_800);
/// The oldest NCCL with [`SHARED_GPUS`].
const OLDEST_SHARING: Version = Version::packed(23_003);
/// Lets several ranks of NCCL share a GPU.
const SHARED_GPUS: &str = "NCCL_MULTI_RANK_GPU_ENABLE";

/// What carries rows between GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExchangeRequest {
    /// NCCL where all ranks can, else TCP.
    #[default]
    Auto,
    /// TCP between hosts.
    Tcp,
    /// NCCL; nothing else will do.
    Nccl,
    /// NCCL, with the exchanges of small steps within graphs; on all ranks or none.
    NcclGraphs,
}

impl ExchangeRequest {
    /// Whether nothing but NCCL will do.
    #[must_use]
    pub const fn insists_on_nccl(self) -> bool {
        matches!(self, Self::Nccl | Self::NcclGraphs)
    }
}

impl FromStr for ExchangeRequest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "tcp" => Ok(Self::Tcp),
            "nccl" => Ok(Self::Nccl),
            "nccl-graphs" => Ok(Self::NcclGraphs),
            _ => Err("give auto, tcp, nccl or nccl-graphs".to_owned()),
        }
    }
}

impl fmt::Display for ExchangeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::Nccl => "nccl",
            Self::NcclGraphs => "nccl-graphs",
        })
    }
}

/// What a rank can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// What it was asked for.
    pub request: ExchangeRequest,
    /// Its NCCL, packed as NCCL does; 0 without one.
    pub nccl: i32,
    /// Its GPU.
    pub gpu: [u8; 16],
    /// Whether its GPU may be shared by ranks.
    pub shared: bool,
}

/// Bytes of an offer on the wire.
const OFFER_BYTES: usize = 22;

impl Offer {
    /// What this rank can do with the GPU behind `port`.
    #[must_use]
    pub fn of(request: ExchangeRequest, port: &Port) -> Self {
        let version = || Api::load().ok().and_then(|_| Library::Nccl.version().ok());
        // A library is loaded only where it may be used.
        let nccl = if request == ExchangeRequest::Tcp { None } else { version() };
        Self {
            request,
            nccl: nccl.map_or(0, |Version { major, minor, patch }| major * 10_000 + minor * 100 + patch.unwrap_or(0)),
            gpu: port.uuid().unwrap_or_default(),
            shared: std::env::var(SHARED_GPUS).is_ok_and(|value| value == "1"),
        }
    }

    fn encode(self) -> [u8; OFFER_BYTES] {
        let mut bytes = [0; OFFER_BYTES];
        bytes[0] = match self.request {
            ExchangeRequest::Auto => 0,
            ExchangeRequest::Tcp => 1,
            ExchangeRequest::Nccl => 2,
            ExchangeRequest::NcclGraphs => 3,
        };
        bytes[1] = u8::from(self.shared);
        bytes[2..6].copy_from_slice(&self.nccl.to_le_bytes());
        bytes[6..].copy_from_slice(&self.gpu);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; OFFER_BYTES] = bytes.try_into().ok()?;
        let request = match bytes[0] {
            0 => ExchangeRequest::Auto,
            1 => ExchangeRequest::Tcp,
            2 => ExchangeRequest::Nccl,
            3 => ExchangeRequest::NcclGraphs,
            _ => return None,
        };
        let shared = match bytes[1] {
            0 => false,
            1 => true,
            _ => return None,
        };
        let nccl = i32::from_le_bytes(std::array::from_fn(|i| bytes[2 + i]));
        Some(Self { request, nccl, gpu: std::array::from_fn(|i| bytes[6 + i]), shared })
    }
}

/// Why ranks cannot exchange as they are asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoCarrier {
    /// They are asked for what does not go together.
    #[error("rank {0} is started with --exchange {1} and rank {2} with --exchange {3}; start all alike", .ranks[0], .asked[0], .ranks[1], .asked[1])]
    Asked {
        /// Two of them.
        ranks: [Rank; 2],
        /// What each is asked for.
        asked: [ExchangeRequest; 2],
    },
    /// NCCL is asked for where there is no GPU.
    #[error(
        "rank {rank} computes on CPUs, where --exchange {asked} is of no use; give --exchange auto, or --device cuda"
    )]
    Cpu {
        /// The rank.
        rank: Rank,
        /// What it is asked for.
        asked: ExchangeRequest,
    },
    /// NCCL is asked for, and one cannot.
    #[error("rank {rank} is started with --exchange {asked}, but {why}; or use --exchange auto")]
    Nccl {
        /// The rank that is asked.
        rank: Rank,
        /// For what.
        asked: ExchangeRequest,
        /// What is missing.
        why: String,
    },
}

/// What carries the rows of an epoch, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carrier {
    /// NCCL, or TCP between hosts.
    pub nccl: bool,
    /// Whether ranks share a GPU.
    pub shared: bool,
    /// Whether exchanges become part of graphs.
    pub captures: bool,
    /// Why, to be said once.
    pub why: String,
}

/// What carries the rows, by the offers of all ranks, `[ranks]`: the same on every rank.
///
/// # Errors
/// The ranks are not asked for the same, or not for what they can.
pub fn carrier(offers: &[Offer]) -> Result<Carrier, NoCarrier> {
    let ranks = || (0..).map(Rank).zip(offers);
    let asked = |is: fn(ExchangeRequest) -> bool| {
        ranks().find(|(_, offer)| is(offer.request)).map(|(rank, offer)| (rank, offer.request))
    };
    let nccl = asked(ExchangeRequest::insists_on_nccl);
    let tcp = asked(|request| request == ExchangeRequest::Tcp);
    let captures = asked(|request| request == ExchangeRequest::NcclGraphs);
    // A rank whose exchanges are not captured does not meet one whose are: so all are asked, or none.
    let other = captures.and_then(|_| asked(|request| request != ExchangeRequest::NcclGraphs));
    if let Some(((rank, one), (other, another))) = nccl.zip(tcp).or_else(|| captures.zip(other)) {
        return Err(NoCarrier::Asked { ranks: [rank, other], asked: [one, another] });
    }
    let gpus: BTreeSet<[u8; 16]> = offers.iter().map(|offer| offer.gpu).collect();
    let shared = gpus.len() < offers.len();
    let lacks = if let Some((rank, _)) = tcp {
        Some(format!("rank {rank} is started with --exchange tcp"))
    } else if let Some((rank, _)) = ranks().find(|(_, offer)| offer.nccl <= 0) {
        Some(format!("rank {rank} has no NCCL; `pip install nvidia-nccl-cu13` and put its folder on LD_LIBRARY_PATH"))
    } else if let Some((rank, offer)) = ranks().find(|(_, offer)| Version::packed(offer.nccl) < OLDEST) {
        Some(format!("the NCCL of rank {rank} is {}, older than {OLDEST}", Version::packed(offer.nccl)))
    } else if shared && !offers.iter().all(|offer| offer.shared && Version::packed(offer.nccl) >= OLDEST_SHARING) {
        Some(format!("ranks share a GPU; give each its own, or set {SHARED_GPUS}=1 for NCCL {OLDEST_SHARING} or newer"))
    } else {
        None
    };
    match (lacks, nccl) {
        (None, _) => {
            let version = offers.iter().map(|offer| offer.nccl).min().unwrap_or(0);
            let graphs = if captures.is_some() { ", and within graphs as all are asked to" } else { "" };
            let why = format!("all ranks have NCCL, {} or newer{graphs}", Version::packed(version));
            Ok(Carrier { nccl: true, shared, captures: captures.is_some(), why })
        }
        (Some(why), Some((rank, asked))) => Err(NoCarrier::Nccl { rank, asked, why }),
        (Some(why), None) => Ok(Carrier { nccl: false, shared, captures: false, why }),
    }
}

/// Tells all ranks this one's offer, and gives those of all.
///
/// # Errors
/// A rank is gone, late or of another build.
pub(super) fn share(
    control: &mut Tcp,
    offer: Offer,
    fence: Fence,
    deadline: Instant,
) -> Result<Vec<Offer>, CollectiveError> {
    const OFFERS: Exchange =
        Exchange { layer: LayerIdx(u32::MAX - 1), kind: ExchangeKind::Dispatch, row_bytes: OFFER_BYTES };
    let ranks = control.size() as usize;
    let mut send = HostParts { by_rank: vec![offer.encode().to_vec(); ranks] };
    let mut received = HostParts::new(ranks);
    control.begin(fence, deadline);
    control.start(OFFERS, &mut send)?;
    control.finish(OFFERS, &mut received)?;
    let read = |(rank, bytes): (u32, &Vec<u8>)| {
        let what = "it does not say how it exchanges rows";
        Offer::decode(bytes).ok_or(CollectiveError::Corrupt { rank: Rank(rank), what })
    };
    let offers: Result<Vec<Offer>, CollectiveError> = (0..).zip(&received.by_rank).map(read).collect();
    offers.map_err(|error| control.fail(error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const REQUESTS: [ExchangeRequest; 4] =
        [ExchangeRequest::Auto, ExchangeRequest::Tcp, ExchangeRequest::Nccl, ExchangeRequest::NcclGraphs];

    fn offers(n: u8) -> Vec<Offer> {
        let offer = |gpu| Offer { request: ExchangeRequest::Auto, nccl: 23_007, gpu: [gpu; 16], shared: false };
        (0..n).map(offer).collect()
    }

    /// What is chosen once one rank's offer is changed.
    fn changed(change: impl Fn(&mut Offer)) -> Result<Carrier, NoCarrier> {
        let mut all = offers(4);
        change(&mut all[2]);
        carrier(&all)
    }

    #[test]
    fn nccl_is_taken_where_every_rank_can() {
        let chosen = carrier(&offers(4)).unwrap();
        assert!(chosen.nccl && !chosen.shared && chosen.why.contains("2.30.7"), "{chosen:?}");
        assert!(changed(|offer| offer.request = ExchangeRequest::Nccl).unwrap().nccl);
        assert!(changed(|offer| offer.nccl = 21_800).unwrap().why.contains("2.18.0"));
    }

    #[test]
    fn what_one_rank_lacks_all_do_without_and_its_name_is_said() {
        type Change = fn(&mut Offer);
        let lacks: [(Change, &str); 4] = [
            (|offer| offer.request = ExchangeRequest::Tcp, "rank 2 is started with --exchange tcp"),
            (|offer| offer.nccl = 0, "rank 2 has no NCCL"),
            (|offer| offer.nccl = 21_704, "the NCCL of rank 2 is 2.17.4, older than 2.18.0"),
            (|offer| offer.gpu = [0; 16], "ranks share a GPU"),
        ];
        for (lack, why) in lacks {
            let chosen = changed(lack).unwrap();
            assert!(!chosen.nccl && chosen.why.contains(why), "{chosen:?}");
        }
    }

    #[test]
    fn a_shared_gpu_needs_every_ranks_consent() {
        let mut all = offers(3);
        all.iter_mut().for_each(|offer| offer.gpu = [7; 16]);
        assert!(!carrier(&all).unwrap().nccl);
        all.iter_mut().for_each(|offer| offer.shared = true);
        let chosen = carrier(&all).unwrap();
        assert!(chosen.nccl && chosen.shared);
        all[1].shared = false;
        assert!(!carrier(&all).unwrap().nccl);
        all[1] = Offer { shared: true, nccl: 22_907, ..all[1] };
        assert!(!carrier(&all).unwrap().nccl);
    }

    #[test]
    fn what_is_asked_for_and_cannot_be_is_an_error_on_all() {
        let mut all = offers(3);
        all[1].request = ExchangeRequest::Nccl;
        all[0].nccl = 0;
        let error = carrier(&all).unwrap_err().to_string();
        assert!(error.contains("rank 1 is started with --exchange nccl, but rank 0 has no NCCL"), "{error}");
        all[2].request = ExchangeRequest::Tcp;
        let error = carrier(&all).unwrap_err().to_string();
        let asked = "rank 1 is started with --exchange nccl and rank 2 with --exchange tcp; start all alike";
        assert_eq!(error, asked);
    }

    #[test]
    fn exchanges_become_part_of_graphs_on_all_ranks_or_none() {
        let mut all = offers(3);
        assert!(!carrier(&all).unwrap().captures);
        all.iter_mut().for_each(|offer| offer.request = ExchangeRequest::NcclGraphs);
        let chosen = carrier(&all).unwrap();
        assert!(chosen.nccl && chosen.captures && chosen.why.contains("within graphs"), "{chosen:?}");
        all[1].nccl = 0;
        let error = carrier(&all).unwrap_err().to_string();
        assert!(error.contains("rank 0 is started with --exchange nccl-graphs, but rank 1 has no NCCL"), "{error}");
        for request in [ExchangeRequest::Auto, ExchangeRequest::Nccl, ExchangeRequest::Tcp] {
            all[2].request = request;
            let error = carrier(&all).unwrap_err().to_string();
            assert!(error.contains(&format!("rank 2 with --exchange {request}; start all alike")), "{error}");
        }
    }

    #[test]
    fn offers_survive_the_wire_and_nothing_else_is_one() {
        for request in REQUESTS {
            let offer = Offer { request, nccl: 23_203, gpu: std::array::from_fn(|i| i as u8), shared: true };
            assert_eq!(Offer::decode(&offer.encode()), Some(offer));
            assert_eq!(request.to_string().parse(), Ok(request));
        }
        let good = offers(1)[0].encode();
        assert_eq!(Offer::decode(&good[1..]), None);
        for (at, byte) in [(0, 4), (1, 2)] {
            let mut bad = good;
            bad[at] = byte;
            assert_eq!(Offer::decode(&bad), None);
        }
        assert!("rdma".parse::<ExchangeRequest>().is_err());
    }
}
