//! Writes files in the format of `torch.save`: a zip archive with a pickle and the values of each tensor.

use std::io::{self, Seek, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::dtype::Dtype;
use super::pickle::opcode as op;
use crate::checkpoint::NamedTensor;

/// Alignment of tensor data in bytes; PyTorch uses the same, for memory mapping.
const ALIGNMENT: u16 = 64;
/// Items set by one opcode, as in Python's pickler.
const BATCH: usize = 1000;

/// Writes the state dict of `tensors` as an archive whose members are in `folder`, with `texts` as extra members,
/// which PyTorch ignores. The output depends on the arguments only.
pub(super) fn write(
    out: impl Write + Seek,
    folder: &str,
    tensors: &[NamedTensor],
    texts: &[(&str, &str)],
) -> io::Result<()> {
    let mut zip = ZipWriter::new(out);
    let written = write_parts(&mut zip, folder, tensors, texts);
    if let Err(e) = written {
        // Dropping it would try to finish the archive again and print the error.
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

/// Opcodes that push an empty `OrderedDict`.
fn push_ordered_dict(out: &mut Vec<u8>) {
    push_global(out, "collections", "OrderedDict");
    out.extend([op::EMPTY_TUPLE, op::REDUCE]);
}

/// Pickles an `OrderedDict` of tensors, each with its own storage, whose key is the tensor's index.
fn pickle(tensors: &[NamedTensor]) -> Vec<u8> {
    let mut out = vec![op::PROTO, 2];
    push_ordered_dict(&mut out);
    let numbered: Vec<_> = tensors.iter().enumerate().collect();
    for batch in numbered.chunks(BATCH) {
        out.push(op::MARK);
        for &(i, tensor) in batch {
            push_text(&mut out, &tensor.name);
            push_global(&mut out, "torch._utils", "_rebuild_tensor_v2");
            // The arguments, of which the first is the storage's persistent ID.
            out.extend([op::MARK, op::MARK]);
            push_text(&mut out, "storage");
            push_global(&mut out, "torch", dtype(tensor).storage());
            push_text(&mut out, &i.to_string());
            push_text(&mut out, "cpu");
            push_int(&mut out, tensor.data.len());
            out.extend([op::TUPLE, op::BINPERSID]);
            // Offset 0 in the storage.
            out.extend([op::BININT1, 0]);
            let mut strides = vec![1; tensor.shape.len()];
            for axis in (1..strides.len()).rev() {
                strides[axis - 1] = strides[axis] * tensor.shape[axis];
            }
            for sizes in [&tensor.shape, &strides] {
                out.push(op::MARK);
                sizes.iter().for_each(|&n| push_int(&mut out, n));
                out.push(op::TUPLE);
            }
            // requires_grad = False, no backward hooks.
            out.push(op::NEWFALSE);
            push_ordered_dict(&mut out);
            out.extend([op::TUPLE, op::REDUCE]);
        }
        out.push(op::SETITEMS);
    }
    out.push(op::STOP);
    out
}

fn push_global(out: &mut Vec<u8>, module: &str, name: &str) {
    out.push(op::GLOBAL);
    out.extend(format!("{module}\n{name}\n").as_bytes());
}

fn push_int(out: &mut Vec<u8>, n: usize) {
    match i32::try_from(n) {
        Ok(n) => {
            out.push(op::BININT);
            out.extend(n.to_le_bytes());
        }
        Err(_) => {
            // Nine bytes, so that the sign bit is clear.
            out.extend([op::LONG1, 9]);
            out.extend((n as u64).to_le_bytes());
            out.push(0);
        }
    }
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    out.push(op::BINUNICODE);
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}
