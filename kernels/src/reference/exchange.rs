//! Rows on their way between ranks.

use crate::{NO_SLOT, Precision, wire};

/// Numbers as wire bytes: f32 or bf16, little endian.
#[must_use]
pub fn to_wire(precision: Precision, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * wire::bytes(precision)];
    wire::encode(precision, values, &mut bytes);
    bytes
}

/// Wire bytes as numbers.
#[must_use]
pub fn from_wire(precision: Precision, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / wire::bytes(precision)];
    wire::decode(precision, bytes, &mut values);
    values
}

/// The record that row `x: [H]` sends to `rank`: `K` slots, those of other ranks empty, and the row. `None` if the
/// rank holds none of the row's experts, whose places (rank, slot) are `chosen`.
#[must_use]
pub fn record(precision: Precision, x: &[f32], chosen: &[(u32, u32)], rank: u32) -> Option<Vec<u8>> {
    chosen.iter().find(|place| place.0 == rank)?;
    let slot = |place: &(u32, u32)| if place.0 == rank { place.1 } else { NO_SLOT };
    let mut record: Vec<u8> = chosen.iter().flat_map(|place| slot(place).to_le_bytes()).collect();
    record.extend(to_wire(precision, x));
    Some(record)
}

/// The slots (of `top_k`) and the row of a record.
#[must_use]
pub fn parse(precision: Precision, record: &[u8], top_k: usize) -> (Vec<u32>, Vec<f32>) {
    let (slots, row) = record.split_at(top_k * 4);
    (slots.as_chunks().0.iter().map(|&slot| u32::from_le_bytes(slot)).collect(), from_wire(precision, row))
}
