//! Writing files as `torch.save` does: a zip archive of a pickle and the numbers of each tensor.

use std::io::{self, Seek, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::dtype::Dtype;
use crate::train::checkpoint::NamedTensor;

/// What the numbers of a tensor are aligned to in the file, as PyTorch's own writer does, for reading by mapping.
const ALIGNMENT: u16 = 64;
/// Tensors that a pickle's command adds at once, as Python does.
const BATCH: usize = 1000;

/// The state dict of `tensors` as an archive whose parts are in `folder`, with `texts` as more parts, which PyTorch does not look
/// at; its content depends on these alone.
pub(super) fn write(
    out: impl Write + Seek,
    folder: &str,
    tensors: &[NamedTensor],
    texts: &[(&str, &str)],
) -> io::Result<()> {
    let mut zip = ZipWriter::new(out);
    let written = write_parts(&mut zip, folder, tensors, texts);
    if let Err(e) = written {
        // Dropped, it would try to end the archive once more and print that it cannot.
        std::mem::forget(zip);
        return Err(e);
    }
    zip.finish()?.flush()
}

fn write_parts<W: Write + Seek>(
    zip: &mut ZipWriter<W>,
    folder: &str,
    tensors: &[NamedTensor],
    texts: &[(&str, &str)],
) -> io::Result<()> {
    let plain = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut part = |name: &str, long: bool, bytes: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>| {
        let options = plain.with_alignment(ALIGNMENT).large_file(long);
        zip.start_file(format!("{folder}/{name}"), options)?;
        bytes(zip)
    };
    let pickle = pickle(tensors);
    part("data.pkl", false, &mut |out| out.write_all(&pickle))?;
    part("byteorder", false, &mut |out| out.write_all(b"little"))?;
    for (i, tensor) in tensors.iter().enumerate() {
        let dtype = dtype(tensor);
        let long = (tensor.data.len() as u64) * dtype.bytes() as u64 >= u64::from(u32::MAX);
        part(&format!("data/{i}"), long, &mut |out| {
            for values in tensor.data.chunks(1 << 16) {
                let bytes: Vec<u8> = match dtype {
                    Dtype::I64 => values.iter().flat_map(|&v| (v as i64).to_le_bytes()).collect(),
                    _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                };
                out.write_all(&bytes)?;
            }
            Ok(())
        })?;
    }
    part("version", false, &mut |out| out.write_all(b"3\n"))?;
    for (name, text) in texts {
        part(name, false, &mut |out| out.write_all(text.as_bytes()))?;
    }
    Ok(())
}

fn dtype(tensor: &NamedTensor) -> Dtype {
    if tensor.is_counter() { Dtype::I64 } else { Dtype::F32 }
}

/// An ordered dictionary of tensors, each with a storage of its own, called by its number.
fn pickle(tensors: &[NamedTensor]) -> Vec<u8> {
    let mut out = b"\x80\x02ccollections\nOrderedDict\n)R".to_vec();
    let numbered: Vec<_> = tensors.iter().enumerate().collect();
    for batch in numbered.chunks(BATCH) {
        out.push(b'(');
        for &(i, tensor) in batch {
            text(&mut out, &tensor.name);
            out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
            text(&mut out, "storage");
            out.extend(format!("ctorch\n{}\n", dtype(tensor).storage()).as_bytes());
            text(&mut out, &i.to_string());
            text(&mut out, "cpu");
            whole(&mut out, tensor.data.len());
            // The storage, and where in it the tensor begins.
            out.extend(b"tQK\x00");
            let mut strides = vec![1; tensor.shape.len()];
            for axis in (1..strides.len()).rev() {
                strides[axis - 1] = strides[axis] * tensor.shape[axis];
            }
            for sizes in [&tensor.shape, &strides] {
                out.push(b'(');
                sizes.iter().for_each(|&n| whole(&mut out, n));
                out.push(b't');
            }
            // Without a gradient, without hooks.
            out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        }
        out.push(b'u');
    }
    out.push(b'.');
    out
}

fn whole(out: &mut Vec<u8>, n: usize) {
    match i32::try_from(n) {
        Ok(n) => {
            out.push(b'J');
            out.extend(n.to_le_bytes());
        }
        Err(_) => {
            out.extend([0x8a, 9]);
            out.extend((n as u64).to_le_bytes());
            out.push(0);
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}
