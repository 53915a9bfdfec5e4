//! Attention.

use super::{Arg, CONTROL, Place, Translation, input, int, output};
use crate::translate::simple::thresholds;
use ddpm_engine::Factors;
use ddpm_engine::graph::{Graph, Node};
use ddpm_engine::ops::{Attention, Dropout};
use ddpm_kernels::random::weight_threshold;

/// Threads of a block, as in `attention.cu`.
const BLOCK: usize = 128;

/// Kernels for heads up to a width: forward, dq, dk and dv; how many threads there are for each query.
struct Kernels {
    width: usize,
    threads: usize,
    names: [&'static str; 3],
}

macro_rules! kernels {
    ($kind:literal : $($width:literal $threads:literal),*) => {
        [$(Kernels {
            width: $width,
            threads: $threads,
            names: [
                concat!("attention_", $kind, $width),
                concat!("attention_", $kind, "dq_", $width),
                concat!("attention_", $kind, "dkv_", $width),
            ],
        }),*]
    };
}

const KERNELS: [Kernels; 8] = kernels!["" : 4 1, 8 1, 16 1, 32 1, 64 2, 128 4, 256 8, 512 16];

/// On tensor cores, for widths of a multiple of 8; a block has 64 queries.
const TENSOR_CORES: [Kernels; 4] = kernels!["bf16_" : 16 2, 32 2, 64 2, 128 2];

/// Whether an attention's heads are narrow enough for tensor cores.
pub(super) fn on_tensor_cores(graph: &Graph, node: &Node, op: &Attention) -> bool {
    let width = graph.shape(node.inputs[0]).channels() / 3 / op.heads;
    tensor_cores(width).is_some()
}

fn tensor_cores(width: usize) -> Option<&'static Kernels> {
    TENSOR_CORES.iter().find(|k| k.width >= width && width.is_multiple_of(8))
}

/// Purpose, threshold and scale, as on the CPU; without dropout such that nothing is dropped.
fn dropout(op: Option<&Dropout>) -> [Arg<Place>; 3] {
    op.map_or([Arg::Uint(0), Arg::Uint(0), Arg::Float(1.0)], |op| {
        let (threshold, scale) = weight_threshold(op.p);
        let [purpose, ..] = thresholds(op);
        [purpose, Arg::Uint(threshold), Arg::Float(scale)]
    })
}

impl Translation<'_> {
    /// (pictures, tokens, channels, kernels, whether they take bf16)
    fn attention_sizes(
        &self,
        op: &Attention,
    ) -> Result<(usize, usize, usize, &'static Kernels, bool), String> {
        let (n, c) = (self.inputs[0].dims()[0], self.inputs[0].channels() / 3);
        let (tokens, width) = (self.inputs[0].len() / n / (3 * c), c / op.heads);
        let fast = tensor_cores(width).filter(|_| self.arithmetic.factors == Factors::Bf16);
        let kernels = fast.or_else(|| KERNELS.iter().find(|k| k.width >= width)).ok_or_else(|| {
            format!("its heads are {width} numbers wide, and its kernels take 512 at most: take more heads")
        })?;
        if op.heads > 65_535 {
            return Err("its kernels take 65,535 heads at most".to_owned());
        }
        Ok((n, tokens, c, kernels, fast.is_some()))
    }

    pub(super) fn attention(&mut self, op: &Attention) -> Result<(), String> {
        let (n, tokens, c, kernels, half) = self.attention_sizes(op)?;
        let qkv = if half { self.in_bf16(0, self.inputs[0].len()) } else { input(0) };
        let [purpose, threshold, scale] = dropout(op.dropout.as_ref());
        let [tokens_, c, heads] = [tokens, c, op.heads].map(int);
        let args = [qkv, output(0), output(1), tokens_, c, heads, CONTROL, purpose, threshold, scale];
        let grid = [tokens.div_ceil(BLOCK / kernels.threads), op.heads, n];
        self.launch(kernels.names[0], grid, [BLOCK, 1, 1], args);
        Ok(())
    }

    /// Operands `qkv, o, logarithms, do`.
    pub(super) fn attention_grad(&mut self, op: &Attention) -> Result<(), String> {
        let (n, tokens, c, kernels, half) = self.attention_sizes(op)?;
        let rows = n * tokens * op.heads;
        let delta = self.scratch(rows);
        let [mut qkv, o, lse, mut d_o] = [0, 1, 2, 3].map(input);
        if half {
            qkv = self.in_bf16(0, self.inputs[0].len());
            d_o = self.in_bf16(3, self.inputs[3].len());
        }
        self.each("attention_delta", rows, [o, d_o, delta, int(rows), int(c / op.heads)]);
        let [purpose, threshold, scale] = dropout(op.dropout.as_ref());
        let [tokens_, c, heads] = [tokens, c, op.heads].map(int);
        let grid = [tokens.div_ceil(BLOCK / kernels.threads), op.heads, n];
        for name in &kernels.names[1..] {
            let args =
                [qkv, lse, delta, d_o, output(0), tokens_, c, heads, CONTROL, purpose, threshold, scale];
            self.launch(name, grid, [BLOCK, 1, 1], args);
        }
        Ok(())
    }
}
