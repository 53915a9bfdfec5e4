//! cuDNN and cuBLASLt operations, emulated by plain loops in f64: images NHWC, convolution weights `[cout, kh, kw, cin]`, matrix
//! weights `[cin, cout]`.

use ddpm_engine::Result;
use ddpm_engine_cuda::gpu::Gpu;
use ddpm_engine_cuda::library::{ConvPass, Library, LibraryOp, MathMode};
use ddpm_kernels::bf16;

/// Reads elements from memory; the address may carry a format bit, which is ignored.
fn read(gpu: &dyn Gpu, at: usize, count: usize, is_bf16: bool) -> Result<Vec<f64>> {
    let mut bytes = vec![0; count * if is_bf16 { 2 } else { 4 }];
    gpu.read(at & !1, &mut bytes)?;
    Ok(if is_bf16 {
        bytes.chunks_exact(2).map(|b| f64::from(bf16::widen(u16::from_le_bytes([b[0], b[1]])))).collect()
    } else {
        bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
    })
}

fn write(gpu: &dyn Gpu, at: usize, elems: &[f64], is_bf16: bool) -> Result<()> {
    let bytes: Vec<u8> = if is_bf16 {
        elems.iter().flat_map(|&v| bf16::round(v as f32).to_le_bytes()).collect()
    } else {
        elems.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect()
    };
    gpu.write(at & !1, &bytes)
}

pub fn run(gpu: &dyn Gpu, p: &LibraryOp<usize>) -> Result<()> {
    // The workspace belongs to the library up to its last byte.
    gpu.write(p.workspace.0, &vec![0xff; p.workspace.1])?;
    let g = &p.geometry;
    assert!(g.has_symmetric_padding(), "{g:?}");
    assert_eq!(g.is_matmul(), p.library == Library::CublasLt);
    let is_bf16 = p.math == MathMode::Bf16;
    assert!(p.library == Library::CublasLt || p.bf16_result == is_bf16, "cuDNN tensors share one format");
    assert!(is_bf16 || !p.bf16_result);
    for at in [p.x, p.w, p.y].into_iter().chain(p.bias).chain(p.residual) {
        assert_eq!((at % 64) & !1, 0, "tensors must be aligned to 64 bytes");
    }
    let x_len = g.n * g.input.0 * g.input.1 * g.cin;
    let y_len = g.n * g.output.0 * g.output.1 * g.cout;
    let taps = g.kernel.0 * g.kernel.1;
    let w_len = taps * g.cin * g.cout;
    let given = |at, len, result| if result { Ok(vec![0.0; len]) } else { read(gpu, at, len, is_bf16) };
    let mut x = given(p.x, x_len, p.pass == ConvPass::DataGrad)?;
    let mut w = given(p.w, w_len, p.pass == ConvPass::WeightGrad)?;
    let mut y = given(p.y, y_len, p.pass == ConvPass::Forward)?;
    // Index of the weight from channel `ci` of a tap to channel `co`.
    let weight = |co: usize, tap: usize, ci: usize| match p.library {
        Library::Cudnn => (co * taps + tap) * g.cin + ci,
        Library::CublasLt => ci * g.cout + co,
    };
    for row in 0..g.n * g.output.0 {
        for column in 0..g.output.1 {
            let (image, oy) = (row / g.output.0, row % g.output.0);
            let to = (row * g.output.1 + column) * g.cout;
            for tap in 0..taps {
                let iy = (oy * g.stride.0 + tap / g.kernel.1).wrapping_sub(g.pad.0);
                let ix = (column * g.stride.1 + tap % g.kernel.1).wrapping_sub(g.pad.1);
                if iy >= g.input.0 || ix >= g.input.1 {
                    continue;
                }
                let from = ((image * g.input.0 + iy) * g.input.1 + ix) * g.cin;
                for co in 0..g.cout {
                    for ci in 0..g.cin {
                        let (x, w, y) = (&mut x[from + ci], &mut w[weight(co, tap, ci)], &mut y[to + co]);
                        match p.pass {
                            ConvPass::Forward => *y += *x * *w,
                            ConvPass::DataGrad => *x += *y * *w,
                            ConvPass::WeightGrad => *w += *x * *y,
                        }
                    }
                }
            }
        }
    }
    let (at, mut result, channels) = match p.pass {
        ConvPass::Forward => (p.y, y, g.cout),
        ConvPass::DataGrad => (p.x, x, g.cin),
        ConvPass::WeightGrad => (p.w, w, 1),
    };
    if let Some(bias) = p.bias {
        assert!(p.library == Library::CublasLt || p.pass == ConvPass::Forward);
        let bias = read(gpu, bias, channels, p.bf16_result)?;
        result.iter_mut().enumerate().for_each(|(i, v)| *v += bias[i % channels]);
    }
    if let Some(residual) = p.residual {
        assert!(p.library == Library::CublasLt || p.bias.is_some());
        let residual = read(gpu, residual, result.len(), p.bf16_result)?;
        result.iter_mut().zip(residual).for_each(|(v, r)| *v += r);
    }
    write(gpu, at, &result, p.bf16_result)
}
