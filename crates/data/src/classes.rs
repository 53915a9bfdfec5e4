//! The classes of a data set: those with images, in order.

use std::cmp::Ordering;

use ddpm_text::{LISTED, escaped, listed};

/// The classes, and the mapping from the source's class numbers to labels.
pub(super) struct Classes {
    /// The names, by label.
    pub names: Vec<String>,
    /// The label of each of the source's classes; `None` for those without images.
    labels: Vec<Option<u32>>,
}

impl Classes {
    /// `images` has the number of images of each of the source's classes `names`. Classes without images are dropped with a
    /// note; the rest keep their order, or are sorted by name if `sorted`.
    pub fn new(names: &[String], images: &[usize], sorted: bool, notes: &mut Vec<String>) -> Self {
        let mut order: Vec<usize> = (0..names.len()).filter(|&i| images[i] > 0).collect();
        let empty: Vec<_> =
            (0..names.len()).filter(|&i| images[i] == 0).map(|i| escaped(&names[i])).collect();
        if sorted {
            let compare = order_of(order.iter().map(|&i| names[i].as_str()));
            order.sort_by(|&a, &b| compare(&names[a], &names[b]).then(a.cmp(&b)));
        }
        let mut labels = vec![None; names.len()];
        for (label, &i) in (0u32..).zip(&order) {
            labels[i] = Some(label);
        }
        if !empty.is_empty() && !order.is_empty() {
            notes.push(format!(
                "{} without images omitted ({}): {} of {} remain",
                if empty.len() == 1 { "1 class".to_owned() } else { format!("{} classes", empty.len()) },
                listed(&empty, LISTED),
                order.len(),
                names.len(),
            ));
        }
        Self { names: order.into_iter().map(|i| names[i].clone()).collect(), labels }
    }

    /// The label of the source's class `class`.
    pub fn label(&self, class: u32) -> Option<u32> {
        self.labels.get(class as usize).copied().flatten()
    }
}

/// The comparison for sorting names: numeric if all of them are numbers, else natural order (`img2` before `img10`).
pub(super) fn order_of<'a>(names: impl Iterator<Item = &'a str>) -> fn(&str, &str) -> Ordering {
    let mut names = names;
    if names.all(|name| number(name).is_some()) { by_number } else { natural }
}

fn number(name: &str) -> Option<f64> {
    name.trim().parse::<f64>().ok().filter(|n| n.is_finite())
}

fn by_number(a: &str, b: &str) -> Ordering {
    let (x, y) = (number(a).unwrap_or(0.0), number(b).unwrap_or(0.0));
    // -0 and 0 compare equal.
    x.partial_cmp(&y).unwrap_or(Ordering::Equal).then_with(|| natural(a, b))
}

/// Compares runs of digits as integers and everything else byte by byte; ties are broken by the bytes.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut x, mut y) = (a.as_bytes(), b.as_bytes());
    while let (Some(p), Some(q)) = (x.first(), y.first()) {
        let order = if p.is_ascii_digit() && q.is_ascii_digit() {
            let (m, n) = (take_digits(&mut x), take_digits(&mut y));
            m.len().cmp(&n.len()).then_with(|| m.cmp(n))
        } else {
            (x, y) = (&x[1..], &y[1..]);
            p.cmp(q)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    x.len().cmp(&y.len()).then_with(|| a.as_bytes().cmp(b.as_bytes()))
}

/// Splits the leading digits off `text` and returns them without leading zeros.
fn take_digits<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text.iter().position(|b| !b.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    *text = rest;
    let zeros = digits.iter().take_while(|&&b| b == b'0').count();
    &digits[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(names: &[&str]) -> Vec<String> {
        let mut names: Vec<String> = names.iter().map(|&n| n.to_owned()).collect();
        let compare = order_of(names.iter().map(String::as_str));
        names.sort_by(|a, b| compare(a, b));
        names
    }

    #[test]
    fn names_sort_numerically_or_naturally() {
        assert_eq!(sorted(&["10", "2", "1", "12"]), ["1", "2", "10", "12"]);
        assert_eq!(sorted(&["0.5", "-1", "1e1", "2.5"]), ["-1", "0.5", "2.5", "1e1"]);
        assert_eq!(sorted(&["02", "1", "2", "01"]), ["01", "1", "02", "2"]);
        assert_eq!(sorted(&["class10", "class9", "class 1"]), ["class 1", "class9", "class10"]);
        assert_eq!(sorted(&["b", "a10x", "a2y", "a2", "B"]), ["B", "a2", "a2y", "a10x", "b"]);
        // Longer than any integer type.
        assert_eq!(sorted(&["x99999999999999999999", "x100000000000000000000"])[0], "x99999999999999999999");
        assert_eq!(sorted(&["18446744073709551617", "18446744073709551616"])[0], "18446744073709551616");
    }

    #[test]
    fn the_order_of_names_is_total() {
        let names = [
            "", "1", "01", "001", "1a", "a", "a1", "a01", "-1", "1.0", "é", "10", "nan", "1 ", "a1b2",
            "a1b10",
        ];
        for compare in [natural, by_number] {
            for a in names {
                for b in names {
                    assert_eq!(compare(a, b), compare(b, a).reverse(), "{a:?} {b:?}");
                    assert_eq!(compare(a, b) == Ordering::Equal, a == b, "{a:?} {b:?}");
                    for c in names {
                        if compare(a, b).is_lt() && compare(b, c).is_lt() {
                            assert!(compare(a, c).is_lt(), "{a:?} {b:?} {c:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn classes_without_images_are_dropped() {
        let all = ["1", "10", "2"].map(str::to_owned);
        let new = |images: &[usize], sorted| {
            let mut notes = Vec::new();
            let classes = Classes::new(&all, images, sorted, &mut notes);
            let labels: Vec<_> = (0..4).map(|i| classes.label(i)).collect();
            (classes.names.join(" "), labels, notes.join("\n"))
        };
        let note = "1 class without images omitted (10): 2 of 3 remain".to_owned();
        let none = String::new;
        assert_eq!(new(&[1, 1, 1], true), ("1 2 10".into(), vec![Some(0), Some(2), Some(1), None], none()));
        assert_eq!(new(&[1, 1, 1], false), ("1 10 2".into(), vec![Some(0), Some(1), Some(2), None], none()));
        assert_eq!(new(&[4, 0, 1], true), ("1 2".into(), vec![Some(0), None, Some(1), None], note));
        assert_eq!(new(&[0, 0, 0], true), (none(), vec![None; 4], none()));
    }
}
