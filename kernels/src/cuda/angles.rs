//! Cosines and sines of positions: made once, copied into every step that has them.

use crate::RopeTable;

/// Positions whose angles are made together.
const STRETCH: usize = 64;
/// Stretches that are kept: those of the first 131,072 positions. Angles of later ones are made whenever they are needed.
const STRETCHES_MAX: usize = 2048;

/// Cosines and sines of a position, `[D/2]` each.
type Pair = [Vec<f32>; 2];

/// The angles of a rope table.
#[derive(Debug, Default)]
pub(super) struct Angles {
    table: Option<RopeTable>,
    /// `[STRETCH * D/2]` cosines and as many sines.
    stretches: Vec<Option<Pair>>,
}

impl Angles {
    /// Cosines and sines of rows at these positions, `[T, D/2]` each.
    pub(super) fn of(&mut self, positions: &[u32], table: &RopeTable) -> Pair {
        if self.table.as_ref() != Some(table) {
            *self = Self { table: Some(table.clone()), stretches: Vec::new() };
        }
        let half = table.inv_freq.len();
        let mut rows = [(); 2].map(|()| Vec::with_capacity(positions.len() * half));
        for &position in positions {
            let (stretch, at) = (position as usize / STRETCH, position as usize % STRETCH * half);
            if stretch >= STRETCHES_MAX {
                made(position..=position, table, &mut rows);
                continue;
            }
            if self.stretches.len() <= stretch {
                self.stretches.resize(stretch + 1, None);
            }
            let angles = self.stretches[stretch].get_or_insert_with(|| {
                let first = (stretch * STRETCH) as u32;
                let mut angles = Pair::default();
                made(first..=first + STRETCH as u32 - 1, table, &mut angles);
                angles
            });
            for (row, angles) in rows.iter_mut().zip(angles) {
                row.extend_from_slice(&angles[at..at + half]);
            }
        }
        rows
    }
}

/// Makes angles in f64 and rounds them to f32.
fn made(positions: std::ops::RangeInclusive<u32>, table: &RopeTable, [cos, sin]: &mut Pair) {
    for position in positions {
        for frequency in &table.inv_freq {
            let (s, c) = libm::sincos(f64::from(position) * frequency);
            cos.push((c * table.scale) as f32);
            sin.push((s * table.scale) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(scale: f64) -> RopeTable {
        RopeTable { inv_freq: vec![1.0, 0.37, 1e-4], scale }
    }

    fn expected(positions: &[u32], table: &RopeTable) -> Pair {
        let mut rows = Pair::default();
        positions.iter().for_each(|&position| made(position..=position, table, &mut rows));
        rows
    }

    #[test]
    fn angles_are_those_of_each_position_alone() {
        let mut angles = Angles::default();
        let (one, other) = (table(1.3), table(0.5));
        for table in [&one, &one, &other, &one] {
            for positions in [&[0, 1, 63, 64, 65, 131_071, 131_072, u32::MAX][..], &[], &[200, 7, 7, 200], &[64]] {
                assert_eq!(angles.of(positions, table), expected(positions, table));
            }
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut angles = Angles::default();
        angles.of(&[0, 131_071, 131_072, u32::MAX], &table(1.0));
        assert_eq!(angles.stretches.len(), STRETCHES_MAX);
        assert_eq!(angles.stretches.iter().flatten().count(), 2);
    }
}
