package boards

func job() Board {
	// A device's series belong to the job while it holds the device.
	joined := func(metric string) string {
		return `sum by (gpu_uuid) (` + metric + ` * on (instance, gpu_uuid) group_left max by (instance, gpu_uuid) (lorayard_job_info{job_id="$job"}))`
	}
	curve := func(column string) []Ask {
		return []Ask{series(`SELECT at AS "time", 'attempt ' || attempt AS metric, ` + column + ` AS value FROM lorayard_views.samples WHERE job::text = '$job' AND $__timeFilter(at) AND ` + column + ` <> 'NaN' ORDER BY 1`)}
	}
	return Board{
		UID: uidJob, Title: "Job", About: "One job from its admission to its bill: curves across attempts, devices while it held them, checkpoints, lines, money.",
		Vars: []Var{{Name: "job", Label: "Job", SQL: `SELECT job::text FROM lorayard_views.jobs ORDER BY created_at DESC LIMIT 500`}},
		Rows: []Row{
			{"The job", []Panel{
				{
					Title: "Where it stands", About: "The job's row, with why it waits or why it failed.", Kind: Table, Unit: "none", Width: 24, Height: 4, Units: map[string]string{"percent": "percent", "dollars": "currencyUSD"},
					Asks: []Ask{table(`SELECT status, stage, state, wish, gpus, base_model, agent, attempts, failures, losses, step, steps, percent, dollars, waiting, error_message, created_at, started_at, completed_at, estimated_completion_at FROM lorayard_views.jobs WHERE job::text = '$job'`)},
				},
				{
					Title: "Attempts", About: "Each with its host, its devices and why it ended.", Kind: Table, Unit: "none", Width: 24, Height: 6,
					Asks: []Ask{table(`SELECT attempt, agent AS instance, array_to_string(devices, ' ') AS devices, assigned_at, accepted_at, ended_at, outcome, kind, message, resume_step FROM lorayard_views.attempts WHERE job::text = '$job' ORDER BY attempt`)}, Drill: uidHost, DrillBy: "instance",
				},
			}},
			{"Curves", []Panel{
				{
					Title: "Training loss by step", About: "Across attempts: where a later one begins it does steps again.", Kind: Curve, Unit: "short", Width: 12, Height: 10, X: "step",
					Asks: []Ask{table(`SELECT step, max(loss) FILTER (WHERE loss <> 'NaN') AS "training loss", max(validation_loss) FILTER (WHERE validation_loss <> 'NaN') AS "validation loss" FROM lorayard_views.samples s WHERE job::text = '$job' AND attempt = (SELECT max(x.attempt) FROM lorayard_views.samples x WHERE x.job = s.job AND x.step = s.step) GROUP BY step ORDER BY step`)},
				},
				{Title: "Training loss in time", About: "One curve an attempt.", Kind: Graph, Unit: "short", Width: 12, Height: 10, Asks: curve("loss")},
				{Title: "Learning rate", About: "As the trainer used it.", Kind: Graph, Unit: "sci", Width: 8, Asks: curve("learning_rate")},
				{Title: "Gradient norm", About: "Before clipping.", Kind: Graph, Unit: "short", Width: 8, Asks: curve("grad_norm")},
				{Title: "Throughput", About: "Tokens a second.", Kind: Graph, Unit: "short", Width: 8, Asks: curve("tokens_per_second")},
			}},
			{"Live", []Panel{
				{Title: "Step", About: "Done, and of all.", Kind: Graph, Unit: "short", Width: 6, Asks: []Ask{p(`max by (attempt) (lorayard_job_step{job_id="$job"})`, "attempt {{attempt}}"), p(`max(lorayard_job_steps{job_id="$job"})`, "all")}},
				{Title: "Loss now", About: "Of the last step.", Kind: Graph, Unit: "short", Width: 6, Asks: []Ask{p(`max by (attempt) (lorayard_job_loss{job_id="$job"})`, "attempt {{attempt}}")}},
				{Title: "Throughput now", About: "Tokens a second.", Kind: Graph, Unit: "short", Width: 6, Asks: []Ask{p(`max by (attempt) (lorayard_job_tokens_per_second{job_id="$job"})`, "attempt {{attempt}}")}},
				{Title: "Age of the checkpoint", About: "What a fault now would cost.", Kind: Graph, Unit: "s", Width: 6, Asks: []Ask{p(`max by (attempt) (lorayard_job_checkpoint_age_seconds{job_id="$job"})`, "attempt {{attempt}}")}},
				{Title: "Utilization of its devices", About: "While it held them.", Kind: Graph, Unit: "percentunit", Width: 8, Max: 1, Asks: []Ask{p(joined("lorayard_gpu_utilization_ratio"), "{{gpu_uuid}}")}},
				{Title: "Memory of its devices", About: "While it held them.", Kind: Graph, Unit: "bytes", Width: 8, Asks: []Ask{p(joined(`lorayard_gpu_memory_bytes{kind="used"}`), "{{gpu_uuid}}")}},
				{Title: "Power of its devices", About: "While it held them.", Kind: Graph, Unit: "watt", Width: 8, Asks: []Ask{p(joined("lorayard_gpu_power_watts"), "{{gpu_uuid}}")}},
			}},
			{"Kept and paid", []Panel{
				{Title: "Checkpoints", About: "In Storage, newest first.", Kind: Table, Unit: "none", Width: 12, Units: map[string]string{"bytes": "bytes"}, Asks: []Ask{table(`SELECT attempt, step, loss, bytes, created_at FROM lorayard_views.checkpoints WHERE job::text = '$job' ORDER BY created_at DESC LIMIT 100`)}},
				{Title: "GPU time", About: "Each device's time; what is not billable costs the user nothing.", Kind: Table, Unit: "none", Width: 12, Units: map[string]string{"gpu_seconds": "s", "dollars": "currencyUSD"}, Asks: []Ask{table(`SELECT attempt, device, class, began, ended, gpu_seconds, billable, CASE WHEN billable THEN dollars ELSE 0 END AS dollars FROM lorayard_views.usage WHERE job::text = '$job' ORDER BY attempt, device, seq`)}},
				{Title: "Lines", About: "The job's log, newest first. Examples of the training data are left out.", Kind: Table, Unit: "none", Width: 24, Height: 12, Asks: []Ask{table(`SELECT at, attempt, level, code, message FROM lorayard_views.logs WHERE job::text = '$job' ORDER BY at DESC, seq DESC LIMIT 500`)}},
			}},
		},
	}
}
