//! The phases in sequence, for tests and benchmarks; shows how they fit together. (The engine runs each on
//! all threads.)

use super::super::{Epilogue, Operands};
use super::{GradOperands, RunValues, Winograd, WinogradGrad};

impl Winograd {
    /// Computes the entire output from `input` and the weights; `memory` has the total length of
    /// [`Winograd::shared_len`].
    pub fn run(
        &self,
        input: &[f32],
        weights: &[f32],
        epilogue: Epilogue<'_>,
        out: &mut [f32],
        memory: &mut [f32],
    ) {
        let [packed_len, values_len, _] = self.shared_len();
        let (packed, others) = memory.split_at_mut(packed_len);
        let one_block = self.blocks().count() == 1;
        for (panels, first_of_part) in self.groups().filter(|_| self.uses_per_thread_panels()) {
            let (values, products) = others.split_at_mut(values_len);
            if first_of_part {
                for (group, to) in values.chunks_exact_mut(self.values_len()).enumerate() {
                    self.values(0, group, panels.start, input, to);
                }
            }
            let rows = self.blocks().next().expect("there is one block");
            let len = self.points() * self.products_len(rows.len(), 1);
            let products = &mut products[..panels.len() * len];
            let mut steps = vec![0.0; self.steps_len()];
            self.steps(panels.clone(), weights, &mut steps);
            self.compute_panels(panels.clone(), values, weights, &steps, products, packed);
            for (panel, products) in panels.zip(products.chunks_exact(len)) {
                let mut rest = &mut *out;
                for row in rows.clone() {
                    let (part, tail) = rest.split_at_mut(self.row_len(row));
                    self.outputs(0, row, panel..panel + 1, products, epilogue, part);
                    rest = tail;
                }
            }
        }
        for (panels, first_of_part) in self.groups().filter(|_| !self.uses_per_thread_panels()) {
            let packed = &mut packed[..panels.len() * self.panel_len()];
            for (panel, to) in panels.clone().zip(packed.chunks_exact_mut(self.panel_len())) {
                self.pack_panel(panel, weights, to);
            }
            let mut rest = &mut *out;
            for rows in self.blocks().filter(|_| self.uses_per_thread_blocks()) {
                let (block, tail) = rest.split_at_mut(rows.clone().map(|row| self.row_len(row)).sum());
                let operands = Operands { input, packed, epilogue };
                self.compute_block(rows, panels.clone(), operands, block, others);
                rest = tail;
            }
            for rows in self.blocks().filter(|_| !self.uses_per_thread_blocks()) {
                let (values, products) = others.split_at_mut(values_len);
                let values = &mut values[..self.value_groups(rows.len()) * self.values_len()];
                if first_of_part || !one_block {
                    for (group, to) in values.chunks_exact_mut(self.values_len()).enumerate() {
                        self.values(rows.start, group, panels.start, input, to);
                    }
                }
                let len = self.products_len(rows.len(), panels.len());
                let products = &mut products[..self.points() * len];
                for (point, to) in products.chunks_exact_mut(len).enumerate() {
                    self.multiply(point, panels.len(), values, packed, to);
                }
                for row in rows.clone() {
                    let (part, tail) = rest.split_at_mut(self.row_len(row));
                    self.outputs(rows.start, row, panels.clone(), products, epilogue, part);
                    rest = tail;
                }
            }
        }
    }
}

impl WinogradGrad {
    /// Computes `dw` and `db`; `memory` has the total length of [`WinogradGrad::shared_len`].
    pub fn run(&self, input: &[f32], dy: &[f32], dw: &mut [f32], db: &mut [f32], memory: &mut [f32]) {
        let [v_all, y_all, b_all, sums_all, _] = self.shared_len();
        let [v_len, y_len, b_len] = self.run_len();
        let (sums_len, points) = self.sums_len();
        let (values, rest) = memory.split_at_mut(v_all + y_all + b_all);
        let (all_sums, by_row) = rest.split_at_mut(sums_all);
        let (taps, cout) = (self.taps(), db.len());
        let by_row = &mut by_row[..taps * cout];
        let cin = dw.len() / (self.parts() * taps * cout);
        let operands = GradOperands { input, dy };
        for (part, rows) in (0..self.parts()).flat_map(|part| self.ranges().map(move |rows| (part, rows))) {
            for (group, sums) in all_sums.chunks_exact_mut(self.group_len()).enumerate() {
                if self.groups() > 1 {
                    self.accumulate_group(part, group, operands, sums, values);
                    continue;
                }
                let (v, rest) = values.split_at_mut(v_all);
                let (y, b) = rest.split_at_mut(y_all);
                let (sums, shares) = sums.split_at_mut(points * sums_len);
                if rows.start == 0 {
                    shares.fill(0.0);
                }
                for (i, runs) in self.blocks(group).enumerate() {
                    let n = runs.len();
                    let (v, y, b) = (&mut v[..n * v_len], &mut y[..n * y_len], &mut b[..n * b_len]);
                    let each = v
                        .chunks_exact_mut(v_len)
                        .zip(y.chunks_exact_mut(y_len))
                        .zip(b.chunks_exact_mut(b_len));
                    for (run, ((v, y), b)) in runs.zip(each).filter(|_| rows.start == 0) {
                        self.values(part, run, operands, RunValues { v, y, bias: b });
                        shares.iter_mut().zip(&*b).for_each(|(sum, share)| *sum += share);
                    }
                    for (point, sums) in sums.chunks_exact_mut(sums_len).enumerate() {
                        self.multiply(point, rows.clone(), v, y, sums, i > 0);
                    }
                }
            }
            for ci in rows.start..rows.end.min(cin) {
                self.reduce(ci - rows.start, all_sums, by_row);
                for (tap, row) in by_row.chunks_exact(cout).enumerate() {
                    dw[(self.place(part, tap) * cin + ci) * cout..][..cout].copy_from_slice(row);
                }
            }
        }
        self.reduce_bias(all_sums, db);
    }
}
