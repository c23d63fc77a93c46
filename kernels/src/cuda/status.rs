//! What kernels found to be wrong: four words on the device, written by the first kernel that found something.

use super::device::Buffer;
use crate::KernelError;

/// Bytes of the status.
pub(super) const BYTES: usize = 16;

/// What was found wrong since the last look; waits.
pub(super) fn take(status: &mut Buffer) -> Result<(), KernelError> {
    let words = words(&status.download(BYTES)?);
    if words[0] != 0 {
        status.upload(0, &[0; BYTES])?;
    }
    read(words)
}

/// The words in their bytes; zeros where there are fewer.
pub(super) fn words(bytes: &[u8]) -> [u32; 4] {
    let mut words = bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word));
    [(); 4].map(|()| words.next().unwrap_or(0))
}

/// Reads the words (code, what, index, length); as in `csrc/common.cuh`.
pub(super) fn read(words: [u32; 4]) -> Result<(), KernelError> {
    const RECEIVED: [&str; 8] = [
        "a part that is not made of whole records",
        "a row for an expert slot that is empty",
        "more rows than a step may have",
        "fewer results than rows",
        "more results than rows",
        "a slot of another step",
        "a slot of another exchange or sender",
        "more than a slot holds",
    ];
    let [code, what, index, len] = words;
    let (index, len) = (index as usize, len as usize);
    match code {
        0 => Ok(()),
        1 => Err(KernelError::Received {
            rank: index,
            what: RECEIVED.get(what as usize).copied().unwrap_or("what no kernel names"),
        }),
        2 => Err(KernelError::Plan { what: "token", index, len }),
        _ => Err(KernelError::Device { what: "tell what went wrong", why: format!("its status is {words:?}") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_errors() {
        assert_eq!(read([0, 7, 7, 7]), Ok(()));
        let received = KernelError::Received { rank: 2, what: "fewer results than rows" };
        assert_eq!(read([1, 3, 2, 0]), Err(received));
        assert_eq!(read([2, 0, 90, 50]), Err(KernelError::Plan { what: "token", index: 90, len: 50 }));
        assert!(matches!(read([9, 0, 0, 0]), Err(KernelError::Device { .. })));
        assert!(read([1, 99, 0, 0]).is_err());
    }
}
