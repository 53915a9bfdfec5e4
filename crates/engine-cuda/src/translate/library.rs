//! What libraries can make of convolutions, linear layers and their gradients, beside our kernels.

use super::{Arg, CONTROL, Place, Rows, Translation, Work, input, int, output};
use crate::library::{Alternative, Geometry, Kind, Libraries, Library, Math, Product};
use std::mem;

/// What is added to a result, by the operands' numbers: bias, image bias, residual.
type Addends = [Option<usize>; 3];

impl Translation<'_> {
    fn factors(&self) -> Math {
        [Math::F32, Math::Tf32, Math::Bf16][self.math()]
    }

    /// Whether an operand is stored as a factor must be.
    fn is_factor(&self, i: usize) -> bool {
        self.half[i] == (self.factors() == Math::Bf16)
    }

    /// Adds a way to make the node: what `build` makes, and the launches of `finish` behind it.
    fn alternative(
        &mut self,
        build: impl FnOnce(&mut Self) -> Product<Place>,
        finish: impl FnOnce(&mut Self),
    ) {
        let own = mem::take(&mut self.work);
        let product = build(self);
        finish(self);
        let Work { launches: after, rows, scratch, kept, .. } = mem::replace(&mut self.work, own);
        // Only one of the ways is taken: they share the node's memory.
        self.work.scratch = self.work.scratch.max(scratch);
        self.work.kept = self.work.kept.max(kept);
        self.work.alternatives.push(Alternative { rows, product, after });
    }

    /// Operand `i`, a parameter `[taps, c, n]` (`[taps, n, c]` where it is `transposed`), kept as `[n, taps, c]`.
    fn kept_rows(&mut self, i: usize, [taps, c, n]: [usize; 3], transposed: bool, half: bool) -> Place {
        let (at, numbers) = (self.work.kept, taps * c * n);
        let words = if half { numbers.div_ceil(2) } else { numbers };
        self.work.kept = (at + words).next_multiple_of(16);
        let to = Place::Kept { at, half };
        self.work.rows.push(Rows { from: Place::Input(i), to, taps, c, n, transposed });
        to
    }

    /// Operand `i`, a parameter of rows of c numbers, as it is or in bf16.
    fn in_format(&mut self, i: usize, c: usize, half: bool) -> Place {
        match half {
            true => self.kept_rows(i, [1, c, self.inputs[i].len() / c], true, true),
            false => Place::Input(i),
        }
    }

    /// The weights `[taps, cin, cout]` as a library takes them.
    fn weights_for(&mut self, library: Library, g: &Geometry) -> Place {
        let half = self.factors() == Math::Bf16;
        match library {
            Library::CublasLt => self.in_format(1, g.cout, half),
            Library::Cudnn => self.kept_rows(1, [g.kernel.0 * g.kernel.1, g.cin, g.cout], false, half),
        }
    }

    /// Adds addends to the result, which is there.
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
        self.each("product_epilogue", n.div_ceil(8), args);
    }

    /// The ways to make the result of operand 0 and weights (operand 1), with what is added.
    pub(super) fn by_libraries(&mut self, kind: Kind, g: Geometry, addends: Addends) {
        let (math, half_result) = (self.factors(), self.half_result);
        // What is kept, is kept of parameters.
        let parameters = self.parameters[1] && addends[0].is_none_or(|i| self.parameters[i]);
        let wanted = self.choices.libraries != Libraries::Never && parameters;
        if !wanted || !self.is_factor(0) || !g.is_even() {
            return;
        }
        // A residual of another format is added afterwards.
        let residual = addends[2].filter(|&i| self.half[i] == half_result);
        let with_bias = [addends[0], residual];
        let (library, ways) = match g.is_plain() {
            true => (Library::CublasLt, vec![with_bias]),
            // All of its tensors have one format.
            false if half_result != (math == Math::Bf16) => return,
            // Only with a bias it adds a residual.
            false if kind == Kind::Forward && addends[0].is_some() => {
                (Library::Cudnn, vec![with_bias, [None; 2]])
            }
            false => (Library::Cudnn, vec![[None; 2]]),
        };
        for [bias, residual] in ways {
            let rest = [
                addends[0].filter(|_| bias.is_none()),
                addends[1],
                addends[2].filter(|_| residual.is_none()),
            ];
            let build = |t: &mut Self| {
                let w = t.weights_for(library, &g);
                let bias = bias.map(|i| t.in_format(i, t.inputs[i].len(), half_result));
                let (x, y) = match kind {
                    Kind::DataGrad => (Place::Output(0), Place::Input(0)),
                    Kind::Forward | Kind::WeightGrad => (Place::Input(0), Place::Output(0)),
                };
                let (geometry, residual) = (g, residual.map(Place::Input));
                let workspace = (Place::Workspace, t.choices.workspace);
                Product { library, kind, math, half_result, geometry, x, w, y, bias, residual, workspace }
            };
            self.alternative(build, |t| t.add_to_result(rest));
        }
    }

    /// The ways to make the weight gradient of x and dy (operands 0 and 1), and that of the bias.
    pub(super) fn weight_grad_by_libraries(&mut self, geometry: Geometry, bias: bool) {
        let math = self.factors();
        let factors = self.is_factor(0) && self.is_factor(1);
        if self.choices.libraries == Libraries::Never || !factors || !geometry.is_even() {
            return;
        }
        let Geometry { n, output: (h, w), kernel, cin, cout, .. } = geometry;
        let rows = kernel.0 * kernel.1 * cin;
        let library = if geometry.is_plain() { Library::CublasLt } else { Library::Cudnn };
        // cuDNN's has the factors' format, and its order of weights.
        let half_result = library == Library::Cudnn && math == Math::Bf16;
        let made = match (library, half_result) {
            (Library::CublasLt, _) => Place::Output(0),
            (Library::Cudnn, true) => Place::HalfScratch(0),
            (Library::Cudnn, false) => Place::Scratch(0),
        };
        let build = |t: &mut Self| {
            if library == Library::Cudnn {
                let numbers = rows * cout;
                t.scratch(if half_result { numbers.div_ceil(2) } else { numbers });
            }
            let (x, w, y) = (Place::Input(0), made, Place::Input(1));
            let (kind, workspace) = (Kind::WeightGrad, (Place::Workspace, t.choices.workspace));
            let (bias, residual) = (None, None);
            Product { library, kind, math, half_result, geometry, x, w, y, bias, residual, workspace }
        };
        self.alternative(build, |t| {
            if library == Library::Cudnn {
                let grid = [rows.div_ceil(32), cout.div_ceil(32), 1];
                let args = [Arg::At(made), output(0), int(cout), int(rows)];
                t.launch("transpose", grid, [32, 8, 1], args);
            }
            if bias {
                t.column_sums(input(1), output(1), 1, n * h * w, cout);
            }
        });
    }
}
