//! Bytes to and from ranks, and which of them has which expert.

use std::sync::Arc;

use super::device::{Buffer, Memory, bytes_of};
use super::rows::Routes;
use super::slots::SLOT_HEADER;
use crate::cpu::check;
use crate::{HostParts, KernelError};

/// Bytes of a part's place: where it begins and how long it is, u64 each.
pub(super) const PART: usize = 16;
/// Parts that lie one after the other begin at multiples of this.
pub const PART_ALIGNMENT: usize = 4;
/// Ranks and slots that an entry of a gathered record can name.
const GATHERED_MAX: usize = 1 << 16;

/// Bytes to or from each rank, on the device: one buffer, and where each part lies in it.
#[derive(Debug)]
pub struct Parts {
    pub(super) ranks: usize,
    pub(super) bytes_max: usize,
    /// As many bytes as there may be of this step, as far as the host knows.
    pub(super) bytes_now: usize,
    /// That is as much as there is room for, from every rank: what came is a part of it.
    pub(super) is_room: bool,
    /// Shared with whoever sends it.
    pub(super) bytes: Arc<Buffer>,
    /// `[ranks]` of (start, bytes), unless these are results.
    places: Buffer,
    /// The same of results, as the receive before them found it. The next one on the same work changes it: until then they
    /// have gone.
    results: Option<Arc<Buffer>>,
    /// This rank, if dispatch records are for all ranks in one part: each rank picks its own.
    pub(super) gathered: Option<u32>,
    /// Why the bytes are worthless.
    pub(super) fault: Option<KernelError>,
}

impl Parts {
    pub(super) fn new(memory: &Arc<Memory>, ranks: usize, bytes_max: usize) -> Result<Self, KernelError> {
        // Parts of any length may come from other ranks, each on a border or behind the header of its slot.
        let bytes = Arc::new(memory.zeroed(bytes_max + ranks * SLOT_HEADER)?);
        Ok(Self {
            ranks,
            bytes_max,
            bytes_now: bytes_max,
            is_room: false,
            bytes,
            places: memory.zeroed(ranks * PART)?,
            results: None,
            gathered: None,
            fault: None,
        })
    }

    pub(super) fn nothing(memory: &Arc<Memory>, ranks: usize) -> Self {
        let (bytes, places) = (Arc::new(memory.nothing()), memory.nothing());
        Self {
            ranks,
            bytes_max: 0,
            bytes_now: 0,
            is_room: false,
            bytes,
            places,
            results: None,
            gathered: None,
            fault: None,
        }
    }

    #[allow(clippy::needless_pass_by_ref_mut, reason = "who writes there must own it alone")]
    pub(super) fn address_mut(&mut self) -> u64 {
        self.bytes.address()
    }

    fn said(&self) -> &Buffer {
        self.results.as_deref().unwrap_or(&self.places)
    }

    /// Where it is said where each part lies, `[ranks]` of (start, bytes).
    pub(super) fn places_address(&self) -> u64 {
        self.said().address()
    }

    /// The same, to be written there.
    pub(super) fn places_mut(&mut self) -> &mut Buffer {
        self.results = None;
        &mut self.places
    }

    /// Whether there is room for where each part lies.
    pub(super) const fn has_places(&self) -> bool {
        self.places.bytes() >= self.ranks * PART
    }

    /// Says that these are results, which lie where `results` says.
    pub(super) fn become_results(&mut self, results: &Arc<Buffer>) {
        (self.results, self.gathered) = (Some(Arc::clone(results)), None);
    }

    /// Whether these are results.
    pub(super) const fn are_results(&self) -> bool {
        self.results.is_some()
    }

    /// Where each part lies, `[ranks]` of (start, bytes); waits.
    ///
    /// # Errors
    /// [`KernelError::Device`]; what went wrong in the step before the bytes were written.
    pub(super) fn places(&self) -> Result<Vec<(usize, usize)>, KernelError> {
        if let Some(error) = &self.fault {
            return Err(error.clone());
        }
        let places = self.said().download(self.ranks * PART)?;
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes")) as usize;
        Ok(places.chunks_exact(PART).map(|p| (number(&p[..8]), number(&p[8..]))).collect())
    }

    /// The bytes, on the host; waits.
    ///
    /// # Errors
    /// [`KernelError::Device`]; what went wrong in the step before the bytes were written.
    pub fn download(&self) -> Result<HostParts, KernelError> {
        let places = self.places()?;
        let end = places.iter().map(|(start, bytes)| start.saturating_add(*bytes)).max().unwrap_or(0);
        let bytes = self.bytes.download(end)?;
        Ok(HostParts { by_rank: places.iter().map(|&(start, len)| bytes[start..start + len].to_vec()).collect() })
    }

    /// Takes bytes from the host.
    ///
    /// # Errors
    /// [`KernelError::Plan`] for another number of ranks, [`KernelError::Size`] for more bytes than there is room for,
    /// [`KernelError::Device`].
    pub fn upload(&mut self, parts: &HostParts) -> Result<(), KernelError> {
        if parts.by_rank.len() != self.ranks {
            return Err(KernelError::Plan { what: "rank", index: parts.by_rank.len(), len: self.ranks });
        }
        let (mut bytes, mut places) = (Vec::new(), Vec::new());
        for part in &parts.by_rank {
            bytes.resize(usize::next_multiple_of(bytes.len(), PART_ALIGNMENT), 0);
            places.extend([bytes.len() as u64, part.len() as u64]);
            bytes.extend_from_slice(part);
        }
        let to = Arc::get_mut(&mut self.bytes).ok_or_else(|| KernelError::Device {
            what: "take bytes",
            why: "an exchange still reads what was there".to_owned(),
        })?;
        to.upload(0, &bytes)?;
        self.places_mut().upload(0, &bytes_of(&places))?;
        (self.bytes_now, self.is_room, self.gathered, self.fault) = (bytes.len(), false, None, None);
        Ok(())
    }
}

/// Where each expert of a layer lives, `[E]` of (rank, slot).
#[derive(Debug)]
pub struct Places {
    places: Vec<(u32, u32)>,
    pub(super) buffer: Buffer,
}

impl Places {
    pub(super) fn new(memory: &Arc<Memory>, places: &[(u32, u32)]) -> Result<Self, KernelError> {
        let flat: Vec<u32> = places.iter().flat_map(|&(rank, slot)| [rank, slot]).collect();
        Ok(Self { places: places.to_vec(), buffer: memory.filled(&bytes_of(&flat))? })
    }

    pub(super) fn nothing(memory: &Arc<Memory>) -> Self {
        Self { places: Vec::new(), buffer: memory.nothing() }
    }

    /// Refuses routes to experts that have no place, and places on ranks that do not exist.
    pub(super) fn check(&self, routes: &Routes, ranks: usize) -> Result<(), KernelError> {
        if routes.len() > 0 {
            check("expert", routes.experts_count().saturating_sub(1), self.places.len())?;
            let last = self.places.iter().map(|place| place.0).max().unwrap_or(0);
            check("rank", last as usize, ranks)?;
        }
        Ok(())
    }

    /// Refuses what an entry of a gathered record cannot name.
    pub(super) fn check_gathered(&self) -> Result<(), KernelError> {
        let largest = self.places.iter().map(|&(rank, slot)| rank.max(slot)).max().unwrap_or(0);
        check("rank or slot of a gathered record", largest as usize, GATHERED_MAX).map(drop)
    }
}
