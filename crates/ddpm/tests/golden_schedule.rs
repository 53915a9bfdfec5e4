//! The linear schedule and the reverse step against numpy's numbers (`tools/golden/schedule.py`).

use ddpm::process::{posterior_mean, predict_x0};
use ddpm::schedule::Schedule;
use serde_json::Value;

/// Relative error of a number of the schedule; both sides are f64.
const TOLERANCE: f64 = 1e-12;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/schedule.json")).expect("JSON")
}

fn list<'a>(v: &'a Value, key: &str) -> &'a [Value] {
    v[key].as_array().unwrap_or_else(|| panic!("no list {key}"))
}

fn numbers(v: &Value, key: &str) -> Vec<f64> {
    list(v, key).iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn singles(v: &Value, key: &str) -> Vec<f32> {
    numbers(v, key).into_iter().map(|x| x as f32).collect()
}

fn count(v: &Value, key: &str) -> usize {
    v[key].as_u64().unwrap_or_else(|| panic!("no number {key}")) as usize
}

#[test]
fn every_number_of_the_schedule_is_numpys() {
    let golden = golden();
    let schedules = list(&golden, "schedules");
    assert_eq!(schedules.len(), 2);
    for entry in schedules {
        let number = |key: &str| entry[key].as_f64().expect("a number");
        let timesteps = count(entry, "timesteps");
        let s = Schedule::linear(timesteps, number("beta_start"), number("beta_end")).expect("a schedule");
        assert_eq!(s.timesteps(), timesteps);
        let quantities: [(&str, &dyn Fn(usize) -> f64); 10] = [
            ("beta", &|t| s.beta(t)),
            ("alpha_bar", &|t| s.alpha_bar(t)),
            ("sqrt_alpha_bar", &|t| s.alpha_bar(t).sqrt()),
            ("sqrt_one_minus_alpha_bar", &|t| (1.0 - s.alpha_bar(t)).sqrt()),
            ("recip_sqrt_alpha", &|t| 1.0 / s.alpha(t).sqrt()),
            ("recip_sqrt_alpha_bar", &|t| 1.0 / s.alpha_bar(t).sqrt()),
            ("recip_sqrt_alpha_bar_minus_one", &|t| (1.0 / s.alpha_bar(t) - 1.0).sqrt()),
            ("beta_tilde", &|t| s.posterior(t).variance),
            ("mean_x0", &|t| s.posterior(t).x0),
            ("mean_xt", &|t| s.posterior(t).xt),
        ];
        for (key, ours) in quantities {
            let expected = numbers(entry, key);
            assert_eq!(expected.len(), list(entry, "t").len());
            for (t, expected) in numbers(entry, "t").into_iter().zip(expected) {
                let ours = ours(t as usize);
                let error = (ours - expected).abs();
                assert!(error <= TOLERANCE * expected.abs(), "{key}, t = {t}: {ours} for {expected}");
            }
        }
    }
}

#[test]
fn a_reverse_step_is_numpys_with_and_without_clipping() {
    let golden = golden();
    let schedule = Schedule::linear(1000, 1e-4, 0.02).expect("a schedule");
    let mut clipped_elements = 0;
    for case in list(&golden, "reverse_steps") {
        assert_eq!(count(case, "timesteps"), schedule.timesteps());
        let t = count(case, "t");
        let (x_t, eps, z) = (singles(case, "x_t"), singles(case, "eps_pred"), numbers(case, "z"));
        let (mut x_0, mut mean) = (vec![0.0; x_t.len()], vec![0.0; x_t.len()]);
        let posterior = schedule.posterior(t);
        let sigma = if t == 0 { 0.0 } else { posterior.variance.sqrt() };
        for (clip, key) in [(false, "x_prev_unclipped"), (true, "x_prev_clipped")] {
            predict_x0(&schedule, t, &x_t, &eps, clip, &mut x_0);
            posterior_mean(&schedule, t, &x_0, &x_t, &mut mean);
            let (expected_x0, expected) = (numbers(case, "x0"), numbers(case, key));
            let eq11 = numbers(case, "x_prev_eps");
            for i in 0..x_t.len() {
                let x0 = if clip { expected_x0[i].clamp(-1.0, 1.0) } else { expected_x0[i] };
                let unit = f64::from(f32::EPSILON);
                let error = (f64::from(x_0[i]) - x0).abs();
                assert!(error <= unit * x0.abs(), "x0, t = {t}: {} for {x0}", x_0[i]);
                let ours = f64::from(mean[i]) + sigma * z[i];
                // Two roundings to f32: of x0 and of the mean.
                let scale = (posterior.x0 * x0).abs() + (posterior.xt * f64::from(x_t[i])).abs();
                let error = (ours - expected[i]).abs();
                assert!(error <= unit * scale, "{key}, t = {t}: {ours} for {}", expected[i]);
                if !clip {
                    let error = (ours - eq11[i]).abs();
                    assert!(error <= unit * scale, "eq. 11, t = {t}: {ours} for {}", eq11[i]);
                } else if expected_x0[i].abs() > 1.0 {
                    clipped_elements += 1;
                }
            }
        }
    }
    let expected: usize = list(&golden, "reverse_steps").iter().map(|c| count(c, "clipped_elements")).sum();
    assert_eq!(clipped_elements, expected);
}
