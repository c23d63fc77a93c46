//! Comparing tensors; a difference is told with its row and column.

/// Every number within `tolerance` times the largest of its row.
pub(crate) fn close(what: &str, cols: usize, expected: &[f32], got: &[f32], tolerance: f32) -> Result<(), String> {
    if expected.len() != got.len() {
        return Err(format!("{what}: {} numbers instead of {}", got.len(), expected.len()));
    }
    for (row, (expected, got)) in expected.chunks(cols).zip(got.chunks(cols)).enumerate() {
        let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        for (column, (e, g)) in expected.iter().zip(got).enumerate() {
            // Written so that NaN fails.
            let within = (e - g).abs() <= tolerance * largest;
            if !within {
                let error = (e - g).abs() / largest;
                return Err(format!(
                    "{what}: row {row}, column {column}: {g} instead of {e}, {error:e} of the row's largest, allowed {tolerance:e}"
                ));
            }
        }
    }
    Ok(())
}

/// Every bit.
pub(crate) fn same(what: &str, cols: usize, expected: &[f32], got: &[f32]) -> Result<(), String> {
    if expected.len() != got.len() {
        return Err(format!("{what}: {} numbers instead of {}", got.len(), expected.len()));
    }
    match expected.iter().zip(got).position(|(e, g)| e.to_bits() != g.to_bits()) {
        None => Ok(()),
        Some(i) => Err(format!(
            "{what}: row {}, column {}: {} ({:08x}) instead of {} ({:08x})",
            i / cols,
            i % cols,
            got[i],
            got[i].to_bits(),
            expected[i],
            expected[i].to_bits()
        )),
    }
}
