//! Attention.

use super::{Arg, CONTROL, Lowering, MemRef, input, int, output};
use crate::lower::simple::thresholds;
use ddpm_engine::graph::{Graph, Node};
use ddpm_engine::ops::{Attention, Dropout};
use ddpm_engine::{MatmulDtype, Shape};
use ddpm_kernels::random::weight_threshold;

/// Threads per block, as in `attention.cu`.
const BLOCK: usize = 128;

/// Kernels for heads up to a width (forward, dq, dk and dv), and the number of threads per query.
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

/// Tensor-core kernels, for widths that are multiples of 8; a block handles 64 queries.
const TENSOR_CORES: [Kernels; 4] = kernels!["bf16_" : 16 2, 32 2, 64 2, 128 2];

/// How an attention is computed.
enum Method {
    /// In tiles, with the weights never in memory; `bf16`: in bf16 on tensor cores.
    Tiled { kernels: &'static Kernels, bf16: bool },
    /// As batched matrix products in bf16, with the scores in memory.
    Matmul,
}

/// Whether an attention has a bf16 implementation.
pub(super) fn on_tensor_cores(graph: &Graph, node: &Node, op: &Attention) -> bool {
    Heads::new(graph.shape(node.inputs[0]), op).bf16_method().is_some()
}

/// Sizes of an attention.
#[derive(Clone, Copy)]
struct Heads {
    n: usize,
    tokens: usize,
    c: usize,
    heads: usize,
}

impl Heads {
    fn new(qkv: Shape, op: &Attention) -> Self {
        let (n, c) = (qkv.dims()[0], qkv.channels() / 3);
        Self { n, tokens: qkv.len() / n / (3 * c), c, heads: op.heads }
    }

    fn bf16_method(&self) -> Option<Method> {
        let fits = TENSOR_CORES.iter().find(|k| k.width >= self.width());
        // Scores and their gradient in f32, the weights and theirs in bf16.
        let counted = 3 * self.scores() <= i32::MAX as usize && self.heads * self.n <= 65_535;
        let method = fits.map(|kernels| Method::Tiled { kernels, bf16: true });
        method.or(counted.then_some(Method::Matmul)).filter(|_| self.width().is_multiple_of(8))
    }

    fn width(&self) -> usize {
        self.c / self.heads
    }

    /// Row stride of the scores, in elements.
    fn stride(&self) -> usize {
        self.tokens.next_multiple_of(8)
    }

    /// Scores per image.
    fn scores(&self) -> usize {
        self.heads * self.tokens * self.stride()
    }

    /// Groups of images whose scores fit into `scores` elements: the first image of each, and their number.
    fn groups(&self, scores: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (n, at_once) = (self.n, (scores / self.scores()).clamp(1, self.n));
        (0..n).step_by(at_once).map(move |first| (first, at_once.min(n - first)))
    }

    /// Part 0, 1 or 2 (q, k, v) of qkv from an image on, as a matrix's `first, stride, image, head` offsets.
    fn of_qkv(&self, part: usize, image: usize) -> [usize; 4] {
        let step = self.tokens * 3 * self.c;
        [image * step + part * self.c, 3 * self.c, step, self.width()]
    }

    fn of_o(&self, image: usize) -> [usize; 4] {
        let step = self.tokens * self.c;
        [image * step, self.c, step, self.width()]
    }

    fn of_scores(&self) -> [usize; 4] {
        [0, self.stride(), self.scores(), self.tokens * self.stride()]
    }
}

/// Purpose, threshold and scale, as on the CPU; without dropout, values that drop nothing.
fn dropout(op: Option<&Dropout>) -> [Arg<MemRef>; 3] {
    op.map_or([Arg::Uint(0), Arg::Uint(0), Arg::Float(1.0)], |op| {
        let (threshold, scale) = weight_threshold(op.p);
        let [purpose, ..] = thresholds(op);
        [purpose, Arg::Uint(threshold), Arg::Float(scale)]
    })
}

impl Lowering<'_> {
    fn attention_method(&self, op: &Attention) -> Result<(Heads, Method), String> {
        let sizes = Heads::new(self.inputs[0], op);
        let width = sizes.width();
        if op.heads > 65_535 {
            return Err("its kernels support at most 65,535 heads".to_owned());
        }
        let bf16 = sizes.bf16_method().filter(|_| self.compute.matmul_dtype == MatmulDtype::Bf16);
        if let Some(method) = bf16 {
            return Ok((sizes, method));
        }
        let kernels = KERNELS.iter().find(|k| k.width >= width).ok_or_else(|| {
            format!(
                "its heads are {width} elements wide, but its kernels support at most 512: use more heads"
            )
        })?;
        Ok((sizes, Method::Tiled { kernels, bf16: false }))
    }

    pub(super) fn attention(&mut self, op: &Attention) -> Result<(), String> {
        let (sizes, method) = self.attention_method(op)?;
        let [purpose, threshold, scale] = dropout(op.dropout.as_ref());
        let [tokens, c, heads] = [sizes.tokens, sizes.c, op.heads].map(int);
        let bf16 = !matches!(method, Method::Tiled { bf16: false, .. });
        let qkv = if bf16 { self.in_bf16(0, self.inputs[0].len()) } else { input(0) };
        let kernels = match method {
            Method::Tiled { kernels, .. } => kernels,
            Method::Matmul => {
                self.attention_by_matmul(&sizes, op, qkv);
                return Ok(());
            }
        };
        let args = [qkv, output(0), output(1), tokens, c, heads, CONTROL, purpose, threshold, scale];
        let grid = [sizes.tokens.div_ceil(BLOCK / kernels.threads), op.heads, sizes.n];
        self.launch(kernels.names[0], grid, [BLOCK, 1, 1], args);
        Ok(())
    }

    /// Operands `qkv, o, logarithms, do`.
    pub(super) fn attention_grad(&mut self, op: &Attention) -> Result<(), String> {
        let (sizes, method) = self.attention_method(op)?;
        let rows = sizes.n * sizes.tokens * op.heads;
        let delta = self.scratch(rows);
        let [mut qkv, o, lse, mut d_o] = [0, 1, 2, 3].map(input);
        if !matches!(method, Method::Tiled { bf16: false, .. }) {
            qkv = self.in_bf16(0, self.inputs[0].len());
            d_o = self.in_bf16(3, self.inputs[3].len());
        }
        self.each("attention_delta", rows, [o, d_o, delta, int(rows), int(sizes.width())]);
        let kernels = match method {
            Method::Tiled { kernels, .. } => kernels,
            Method::Matmul => {
                self.attention_grad_by_matmul(&sizes, op, qkv, d_o, delta);
                return Ok(());
            }
        };
        let [purpose, threshold, scale] = dropout(op.dropout.as_ref());
        let [tokens, c, heads] = [sizes.tokens, sizes.c, op.heads].map(int);
        let grid = [sizes.tokens.div_ceil(BLOCK / kernels.threads), op.heads, sizes.n];
        for name in &kernels.names[1..] {
            let args =
                [qkv, lse, delta, d_o, output(0), tokens, c, heads, CONTROL, purpose, threshold, scale];
            self.launch(name, grid, [BLOCK, 1, 1], args);
        }
        Ok(())
    }

    /// `y = scale a b` per head of a batch of images: each matrix with its `first, stride, image, head` offsets.
    fn matmul(
        &mut self,
        kernel: &'static str,
        [m, n, k]: [usize; 3],
        (images, heads): (usize, usize),
        [a, b, y]: [(Arg<MemRef>, [usize; 4]); 3],
        scale: f32,
    ) {
        let mut args = vec![a.0, b.0, y.0];
        args.extend([m, n, k, heads].map(int));
        args.extend([a.1, b.1, y.1].into_iter().flatten().map(int));
        args.push(Arg::Float(scale));
        let grid = [m.div_ceil(64), n.div_ceil(64), images * heads];
        self.launch_all(kernel, grid, [128, 1, 1], args);
    }

    /// Scores of a group of images.
    fn scores(&mut self, sizes: &Heads, qkv: Arg<MemRef>, (first, count): (usize, usize), to: Arg<MemRef>) {
        let Heads { tokens, heads, .. } = *sizes;
        let (q, k) = (sizes.of_qkv(0, first), sizes.of_qkv(1, first));
        let scale = 1.0 / (sizes.width() as f32).sqrt();
        let operands = [(qkv, q), (qkv, k), (to, sizes.of_scores())];
        self.matmul("matmul_nt", [tokens, tokens, sizes.width()], (count, heads), operands, scale);
    }

    fn attention_by_matmul(&mut self, sizes: &Heads, op: &Attention, qkv: Arg<MemRef>) {
        let Heads { tokens, heads, .. } = *sizes;
        let max_scores =
            sizes.groups(self.options.max_scores).next().map_or(0, |(_, count)| count) * sizes.scores();
        let (scores, p) = (self.scratch(max_scores), self.bf16_scratch(max_scores));
        let dropout = dropout(op.dropout.as_ref());
        for (first, count) in sizes.groups(self.options.max_scores) {
            self.scores(sizes, qkv, (first, count), scores);
            let mut args = vec![scores, p, output(1)];
            args.extend([tokens, sizes.stride(), heads, first].map(int));
            args.push(CONTROL);
            args.extend(dropout);
            let grid = [tokens.div_ceil(8), heads, count];
            self.launch_all("attention_weights", grid, [32, 8, 1], args);
            let operands =
                [(p, sizes.of_scores()), (qkv, sizes.of_qkv(2, first)), (output(0), sizes.of_o(first))];
            self.matmul("matmul_nn", [tokens, sizes.width(), tokens], (count, heads), operands, 1.0);
        }
    }

    fn attention_grad_by_matmul(
        &mut self,
        sizes: &Heads,
        op: &Attention,
        qkv: Arg<MemRef>,
        d_o: Arg<MemRef>,
        delta: Arg<MemRef>,
    ) {
        let Heads { tokens, heads, .. } = *sizes;
        let max_scores =
            sizes.groups(self.options.max_scores).next().map_or(0, |(_, count)| count) * sizes.scores();
        let (scores, dp) = (self.scratch(max_scores), self.scratch(max_scores));
        let (p, ds) = (self.bf16_scratch(max_scores), self.bf16_scratch(max_scores));
        let (dropout, scale) = (dropout(op.dropout.as_ref()), 1.0 / (sizes.width() as f32).sqrt());
        let of = sizes.of_scores();
        for (first, count) in sizes.groups(self.options.max_scores) {
            let (batch, width) = ((count, heads), sizes.width());
            let [q, k, v] = [0, 1, 2].map(|part| sizes.of_qkv(part, first));
            let go = sizes.of_o(first);
            self.scores(sizes, qkv, (first, count), scores);
            let operands = [(d_o, go), (qkv, v), (dp, of)];
            self.matmul("matmul_nt", [tokens, tokens, width], batch, operands, 1.0);
            let mut args = vec![scores, dp, input(2), delta, p, ds];
            args.extend([tokens, sizes.stride(), heads, first].map(int));
            args.extend([Arg::Float(scale), CONTROL]);
            args.extend(dropout);
            self.launch_all("attention_weights_grad", [tokens.div_ceil(8), heads, count], [32, 8, 1], args);
            let (sides, y) = ([tokens, width, tokens], output(0));
            self.matmul("matmul_nn", sides, batch, [(ds, of), (qkv, k), (y, q)], 1.0);
            self.matmul("matmul_tn", sides, batch, [(ds, of), (qkv, q), (y, k)], 1.0);
            self.matmul("matmul_tn", sides, batch, [(p, of), (d_o, go), (y, v)], 1.0);
        }
    }
}
