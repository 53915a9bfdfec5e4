//! Library alternatives for convolutions, linear layers and their gradients.

use super::{Arg, CONTROL, LoweredNode, Lowering, MemRef, input, int, output};
use crate::launch::WeightRepack;
use crate::library::{Alternative, ConvPass, Geometry, Libraries, Library, LibraryOp, MathMode};
use std::mem;

/// Operand indices of what is added to a result: bias, per-image bias, residual.
type Addends = [Option<usize>; 3];

impl Lowering<'_> {
    fn operand_math(&self) -> MathMode {
        [MathMode::F32, MathMode::Tf32, MathMode::Bf16][self.math()]
    }

    /// Whether an operand is stored in the format that libraries need.
    fn has_operand_format(&self, i: usize) -> bool {
        self.bf16[i] == (self.operand_math() == MathMode::Bf16)
    }

    /// Adds an alternative: the operation from `build`, followed by the launches from `finish`.
    fn alternative(
        &mut self,
        build: impl FnOnce(&mut Self) -> LibraryOp<MemRef>,
        finish: impl FnOnce(&mut Self),
    ) {
        let outer = mem::take(&mut self.lowered);
        let op = build(self);
        finish(self);
        let LoweredNode { launches: after, repacks, scratch, cached, .. } =
            mem::replace(&mut self.lowered, outer);
        // Only one candidate is used, so they share the node's memory.
        self.lowered.scratch = self.lowered.scratch.max(scratch);
        self.lowered.cached = self.lowered.cached.max(cached);
        self.lowered.alternatives.push(Alternative { repacks, op, after });
    }

    /// Operand `i`, a parameter `[taps, c, n]` (`[taps, n, c]` if `transposed`), repacked as `[n, taps, c]`.
    fn repack(&mut self, i: usize, [taps, c, n]: [usize; 3], transposed: bool, bf16: bool) -> MemRef {
        let (at, elems) = (self.lowered.cached, taps * c * n);
        let words = if bf16 { elems.div_ceil(2) } else { elems };
        self.lowered.cached = (at + words).next_multiple_of(16);
        let to = MemRef::Cached { at, bf16 };
        self.lowered.repacks.push(WeightRepack { from: MemRef::Input(i), to, taps, c, n, transposed });
        to
    }

    /// Operand `i`, a parameter with rows of `c` elements, as it is or repacked in bf16.
    fn parameter_in(&mut self, i: usize, c: usize, bf16: bool) -> MemRef {
        if bf16 { self.repack(i, [1, c, self.inputs[i].len() / c], true, true) } else { MemRef::Input(i) }
    }

    /// The weights `[taps, cin, cout]` in a library's layout.
    fn weights_for(&mut self, library: Library, g: &Geometry) -> MemRef {
        let bf16 = self.operand_math() == MathMode::Bf16;
        match library {
            Library::CublasLt => self.parameter_in(1, g.cout, bf16),
            Library::Cudnn => self.repack(1, [g.kernel.0 * g.kernel.1, g.cin, g.cout], false, bf16),
        }
    }

    /// Adds addends to the result in place.
    fn add_to_result(&mut self, addends: Addends) {
        if addends == [None; 3] {
            return;
        }
        let y = self.outputs[0];
        let flags = (0..3).map(|i| usize::from(addends[i].is_some()) << i).sum();
        let [bias, per_image_bias, residual] = addends.map(|i| i.map_or(CONTROL, input));
        let (n, c) = (y.len(), y.channels());
        let image = y.nhwc().map_or(n, |[_, h, w, c]| h * w * c);
        let sizes = [n, image, c, flags].map(int);
        let args =
            [output(0), bias, per_image_bias, residual, output(0), sizes[0], sizes[1], sizes[2], sizes[3]];
        self.each("library_epilogue", n.div_ceil(8), args);
    }

    /// Alternatives that compute the result from operand 0 and the weights (operand 1), with addends.
    pub(super) fn conv_by_library(&mut self, pass: ConvPass, g: Geometry, addends: Addends) {
        let (math, bf16_result) = (self.operand_math(), self.bf16_result);
        // Only parameters can be repacked ahead of a run.
        let parameters = self.parameters[1] && addends[0].is_none_or(|i| self.parameters[i]);
        let wanted = self.options.libraries != Libraries::Never && parameters;
        if !wanted || !self.has_operand_format(0) || !g.has_symmetric_padding() {
            return;
        }
        // A residual in another format is added by a kernel.
        let residual = addends[2].filter(|&i| self.bf16[i] == bf16_result);
        let with_bias = [addends[0], residual];
        let (library, variants) = if g.is_matmul() {
            (Library::CublasLt, vec![with_bias])
        } else if bf16_result != (math == MathMode::Bf16) {
            // All tensors of a cuDNN call have the same format.
            return;
        } else if pass == ConvPass::Forward && addends[0].is_some() {
            // cuDNN adds a residual only together with a bias.
            (Library::Cudnn, vec![with_bias, [None; 2]])
        } else {
            (Library::Cudnn, vec![[None; 2]])
        };
        for [bias, residual] in variants {
            let rest = [
                addends[0].filter(|_| bias.is_none()),
                addends[1],
                addends[2].filter(|_| residual.is_none()),
            ];
            let build = |t: &mut Self| {
                let w = t.weights_for(library, &g);
                let bias = bias.map(|i| t.parameter_in(i, t.inputs[i].len(), bf16_result));
                let (x, y) = match pass {
                    ConvPass::DataGrad => (MemRef::Output(0), MemRef::Input(0)),
                    ConvPass::Forward | ConvPass::WeightGrad => (MemRef::Input(0), MemRef::Output(0)),
                };
                let (geometry, residual) = (g, residual.map(MemRef::Input));
                let workspace = (MemRef::Workspace, t.options.workspace);
                LibraryOp { library, pass, math, bf16_result, geometry, x, w, y, bias, residual, workspace }
            };
            self.alternative(build, |t| t.add_to_result(rest));
        }
    }

    /// Alternatives for the weight gradient of x and dy (operands 0 and 1) and the bias gradient.
    pub(super) fn weight_grad_by_library(&mut self, geometry: Geometry, bias: bool) {
        let math = self.operand_math();
        let supported = self.has_operand_format(0) && self.has_operand_format(1);
        if self.options.libraries == Libraries::Never || !supported || !geometry.has_symmetric_padding() {
            return;
        }
        let Geometry { n, output: (h, w), kernel, cin, cout, .. } = geometry;
        let rows = kernel.0 * kernel.1 * cin;
        let library = if geometry.is_matmul() { Library::CublasLt } else { Library::Cudnn };
        // cuDNN's result has its operands' format and its own weight layout.
        let bf16_result = library == Library::Cudnn && math == MathMode::Bf16;
        let result = match (library, bf16_result) {
            (Library::CublasLt, _) => MemRef::Output(0),
            (Library::Cudnn, true) => MemRef::Bf16Scratch(0),
            (Library::Cudnn, false) => MemRef::Scratch(0),
        };
        let build = |t: &mut Self| {
            if library == Library::Cudnn {
                let elems = rows * cout;
                t.scratch(if bf16_result { elems.div_ceil(2) } else { elems });
            }
            let (x, w, y) = (MemRef::Input(0), result, MemRef::Input(1));
            let (pass, workspace) = (ConvPass::WeightGrad, (MemRef::Workspace, t.options.workspace));
            let (bias, residual) = (None, None);
            LibraryOp { library, pass, math, bf16_result, geometry, x, w, y, bias, residual, workspace }
        };
        self.alternative(build, |t| {
            if library == Library::Cudnn {
                let grid = [rows.div_ceil(32), cout.div_ceil(32), 1];
                let args = [Arg::At(result), output(0), int(cout), int(rows)];
                t.launch("transpose", grid, [32, 8, 1], args);
            }
            if bias {
                t.column_sums(input(1), output(1), 1, n * h * w, cout);
            }
        });
    }
}
