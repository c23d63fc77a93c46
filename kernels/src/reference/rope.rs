//! Rotary position embedding.

use crate::RopeTable;

/// Rotates `head: [D]` in place: the pair `(j, j + D/2)` by `position * inv_freq[j]`, times the table's factor.
//= gpt-oss model.py#_apply_rotary_emb
pub fn rotate(head: &mut [f32], position: u32, table: &RopeTable) {
    let half = head.len() / 2;
    for j in 0..half {
        let (sin, cos) = (f64::from(position) * table.inv_freq[j]).sin_cos();
        let (a, b) = (f64::from(head[j]), f64::from(head[j + half]));
        head[j] = ((a * cos - b * sin) * table.scale) as f32;
        head[j + half] = ((b * cos + a * sin) * table.scale) as f32;
    }
}
