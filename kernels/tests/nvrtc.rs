//! Every kernel compiles for every architecture, and keeps what it works on in registers.
//!
//! It needs NVRTC and no GPU: `cargo xtask test --full` brings the library and names its folder in `PHALANX_NVRTC`.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../tests/support/hardware.rs"]
mod hardware;

use std::collections::BTreeMap;

use phalanx_kernels::cuda::KERNELS;
use phalanx_kernels::cuda::compile::{ARCHS, Cache, available, build, compile, files};

/// A little-endian number of `N` bytes.
fn number<const N: usize>(bytes: &[u8], at: usize) -> usize {
    bytes[at..at + N].iter().rev().fold(0, |number, &byte| number << 8 | usize::from(byte))
}

/// A text up to its zero.
fn text(bytes: &[u8], at: usize) -> String {
    bytes[at..].iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte)).collect()
}

/// Bytes of stack (spilled registers and local arrays) and registers of each kernel, from a cubin: an ELF file whose
/// section `.nv.info` has records of (format, attribute, size, symbol, value).
fn resources(cubin: &[u8]) -> BTreeMap<String, (usize, usize)> {
    const STRING_SIZED: u8 = 4;
    const FRAME_SIZE: u8 = 0x11;
    const REGISTERS: u8 = 0x2f;
    let headers = number::<8>(cubin, 0x28);
    let (size, count, names) = (number::<2>(cubin, 0x3a), number::<2>(cubin, 0x3c), number::<2>(cubin, 0x3e));
    // Name, offset, size and link of a section.
    let section = |i: usize| {
        let at = headers + i * size;
        let name = number::<8>(cubin, headers + names * size + 0x18) + number::<4>(cubin, at);
        (text(cubin, name), number::<8>(cubin, at + 0x18), number::<8>(cubin, at + 0x20), number::<4>(cubin, at + 0x28))
    };
    let find = |name: &str| (0..count).map(section).find(|section| section.0 == name).unwrap();
    let (_, symbols, _, strings) = find(".symtab");
    let strings = section(strings).1;
    let (_, info, bytes, _) = find(".nv.info");
    let mut found: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    let mut at = info;
    while at < info + bytes {
        let (format, attribute, length) = (cubin[at], cubin[at + 1], number::<2>(cubin, at + 2));
        if format == STRING_SIZED && (attribute == FRAME_SIZE || attribute == REGISTERS) {
            let symbol = symbols + number::<4>(cubin, at + 4) * 24;
            let kernel = found.entry(text(cubin, strings + number::<4>(cubin, symbol))).or_default();
            let value = number::<4>(cubin, at + 8);
            if attribute == FRAME_SIZE { kernel.0 = value } else { kernel.1 = value }
        }
        at += 4 + if format == STRING_SIZED { length } else { 0 };
    }
    found
}

/// The folder that the full tier names; without it this cannot run.
fn nvrtc() -> bool {
    let named = std::env::var_os("PHALANX_NVRTC").is_some();
    assert!(
        !named || available(),
        "PHALANX_NVRTC is set, and libnvrtc.so.13 cannot be loaded: is it on LD_LIBRARY_PATH?"
    );
    if !named {
        hardware::not_run("PHALANX_NVRTC is not set; cargo xtask test --full brings NVRTC");
    }
    named
}

#[test]
#[ignore = "full tier: needs NVRTC, and compiles every kernel seven times"]
fn nvrtc_compiles_every_kernel_for_every_architecture() {
    if !nvrtc() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("phalanx-nvrtc-{}", std::process::id()));
    let built = build(&ARCHS, &folder, |_| ()).unwrap();
    let mut lacking = Vec::new();
    for arch in ARCHS {
        let of_arch: Vec<_> = built.iter().filter(|built| built.arch == arch).collect();
        let resources: BTreeMap<_, _> = of_arch.iter().flat_map(|built| resources(&built.cubin)).collect();
        for kernel in KERNELS.iter().filter(|kernel| files(arch).any(|(file, _)| file == kernel.file)) {
            match resources.get(kernel.name) {
                None => lacking.push(format!("sm_{arch}: no kernel {}", kernel.name)),
                Some(&(stack, registers)) => {
                    // No published shape has heads of more than 64 numbers: there a few bytes are no loss.
                    let wide_heads = kernel.file == "attention.cu" && kernel.name.ends_with("_128");
                    let most = if wide_heads { 32 } else { 0 };
                    if stack > most {
                        lacking.push(format!("sm_{arch}: {} has {stack} bytes of stack", kernel.name));
                    }
                    // All threads of a block have room in a multiprocessor's 65,536 registers.
                    if registers == 0 || registers * kernel.threads as usize > 65_536 {
                        lacking.push(format!("sm_{arch}: {} has {registers} registers", kernel.name));
                    }
                }
            }
        }
    }
    assert!(lacking.is_empty(), "{}", lacking.join("\n"));
    // The folder serves as it is, and what is damaged in it is made anew.
    let cache = Cache::new(&folder);
    let rope = built.iter().find(|built| built.file == "rope.cu" && built.arch == "90a").unwrap();
    assert_eq!(cache.cubin("rope.cu", "90a").unwrap(), rope.cubin);
    for entry in std::fs::read_dir(folder.join("sm_90a")).unwrap().flatten() {
        std::fs::write(entry.path(), "damaged").unwrap();
    }
    assert_eq!(cache.cubin("rope.cu", "90a").unwrap(), rope.cubin, "compiling twice gives the same bytes");
    assert!(cache.cubin("rope.cu", "1").unwrap_err().to_string().starts_with("NVRTC cannot compile rope.cu for sm_1"));
    std::fs::remove_dir_all(&folder).unwrap();
}

/// What reads cubins sees a stack where there is one.
#[test]
#[ignore = "full tier: needs NVRTC"]
fn nvrtc_keeps_an_array_indexed_at_run_time_on_the_stack() {
    if !nvrtc() {
        return;
    }
    let text = "#include \"common.cuh\"\n struct Args { u32* numbers; };\n KERNEL(turns, 32, Args) { u32 array[32]; \
                for (u32 i = 0; i < 32; i++) array[a.numbers[i] % 32] = i; a.numbers[0] = array[a.numbers[1] % 32]; }";
    for arch in ARCHS {
        let (stack, registers) = resources(&compile("turns.cu", text, arch).unwrap())["turns"];
        assert!(stack >= 128 && registers > 0, "sm_{arch}: {stack} bytes of stack, {registers} registers");
    }
}
