"""The table of all names inside other libraries that dpokit overrides, calls, reads or sets; an upgrade may move them.

`tests/test_upstream.py` reports each name that the installed libraries do not have, and each name that the source uses
and the table lacks. A public name has a row if dpokit overrides or sets it although its library does not ask for that,
or if it comes from a subpackage of TRL. Nothing imports this table but the test.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, order=True)
class UpstreamName:
    """One name.

    Attributes:
        name: its dotted path; the last part may be an attribute of instances, an argument or a key.
        used_in: our files, relative to this one's folder.
        kind: what we do with it; of several, the last one in the order read, call, override, set.
        why: what we need it for.
        upstream: the file that defines it, in the folder where the library is installed.
        delete_when: what makes our use of it unnecessary.
    """

    name: str
    used_in: tuple[str, ...]
    kind: Literal["read", "call", "override", "set"]
    why: str
    upstream: str
    delete_when: str


UPSTREAM_NAMES: tuple[UpstreamName, ...] = (
    UpstreamName(
        "accelerate.Accelerator.gather",
        ("train/steps.py",),
        "set",
        why="TRL gathers each metric of each micro-batch from all ranks; while TRL computes a loss, gather "
        "returns its argument, and ranks add up their sums once per log.",
        upstream="accelerate/accelerator.py",
        delete_when="TRL keeps sums and counts and gathers them once per log.",
    ),
    UpstreamName(
        "accelerate.Accelerator.gather_for_metrics",
        ("train/steps.py",),
        "set",
        why="TRL gathers each metric of each micro-batch from all ranks; while TRL computes a loss, "
        "gather_for_metrics returns its argument.",
        upstream="accelerate/accelerator.py",
        delete_when="TRL keeps sums and counts and gathers them once per log.",
    ),
    UpstreamName(
        "accelerate.PartialState.distributed_type",
        ("distributed/placement.py",),
        "set",
        why="accelerate ignores a request for FSDP on CPU processes and runs DDP; with the type MULTI_GPU it "
        "shards them over gloo.",
        upstream="accelerate/state.py",
        delete_when="accelerate supports FSDP on CPU processes.",
    ),
    UpstreamName(
        "argparse.ArgumentParser._actions",
        ("settings/flags.py",),
        "read",
        why="The flag parser lists all flags that TRL's parser defines, changes a few of them and clears their "
        "defaults.",
        upstream="argparse.py",
        delete_when="argparse lists the actions of a parser in public.",
    ),
    UpstreamName(
        "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu",
        ("model/load.py",),
        "set",
        why="On processors with AVX512-BF16 an evaluation repacks 4-bit weights in place, and a repacked layer "
        "passes no gradient back; False prevents that.",
        upstream="bitsandbytes/nn/modules.py",
        delete_when="bitsandbytes unpacks the weights before it trains on.",
    ),
    UpstreamName(
        "datasets.Dataset.save_to_disk._data_files",
        ("data/sources.py",),
        "read",
        why="The names of data files in a saved dataset's state.json are checked before load_from_disk opens "
        "them: a name must not lead out of the folder.",
        upstream="datasets/arrow_dataset.py",
        delete_when="load_from_disk refuses names that lead out of its folder.",
    ),
    UpstreamName(
        "datasets.config.HF_UPDATE_DOWNLOAD_COUNTS",
        ("__init__.py",),
        "set",
        why="datasets reports each load, also that of a local file, to a server; if it was imported before dpokit, it "
        "has read its variable already.",
        upstream="datasets/config.py",
        delete_when="datasets reports no load of local files.",
    ),
    UpstreamName(
        "deepspeed.DeepSpeedEngine._config",
        ("train/resuming.py",),
        "set",
        why="After a universal checkpoint is loaded, load_universal_checkpoint of the engine's configuration "
        "becomes False, because later checkpoints of the run are ordinary ones.",
        upstream="deepspeed/runtime/engine.py",
        delete_when="DeepSpeed decides for each checkpoint whether it is a universal one.",
    ),
    UpstreamName(
        "deepspeed.runtime.zero.partition_parameters.Init.ds_numel",
        ("distributed/placement.py", "model/check.py"),
        "read",
        why="A parameter that holds fewer numbers than ds_numel proves that ZeRO-3 shards the model; it also tells the "
        "numbers of the last shard from its padding.",
        upstream="deepspeed/runtime/zero/partition_parameters.py",
        delete_when="DeepSpeed reports in public whether a parameter is sharded.",
    ),
    UpstreamName(
        "deepspeed.runtime.zero.partition_parameters.Init.ds_tensor",
        ("distributed/placement.py", "model/check.py"),
        "read",
        why="ds_tensor is this rank's part of a parameter that ZeRO-3 shards: its size proves the sharding, and "
        "its values are checked to be finite.",
        upstream="deepspeed/runtime/zero/partition_parameters.py",
        delete_when="DeepSpeed gives access to a rank's part of a parameter in public.",
    ),
    UpstreamName(
        "gradio.Blocks._queue",
        ("serve/page.py",),
        "read",
        why="When a session ends, the server drops the events and messages that Gradio's queue still keeps for it.",
        upstream="gradio/blocks.py",
        delete_when="Gradio drops the queued messages of a session that is closed.",
    ),
    UpstreamName(
        "gradio.queueing.Queue.clean_events",
        ("serve/page.py",),
        "call",
        why="clean_events stops the running events of a session that ends and removes the waiting ones.",
        upstream="gradio/queueing.py",
        delete_when="Gradio drops the queued messages of a session that is closed.",
    ),
    UpstreamName(
        "gradio.queueing.Queue.pending_event_ids_session",
        ("serve/page.py",),
        "set",
        why="The entry of a session that ends is removed; Gradio keeps it if nobody reads its messages.",
        upstream="gradio/queueing.py",
        delete_when="Gradio drops the queued messages of a session that is closed.",
    ),
    UpstreamName(
        "gradio.queueing.Queue.pending_messages_per_session",
        ("serve/page.py",),
        "set",
        why="The messages of a session that ends are removed; Gradio keeps them if nobody reads them.",
        upstream="gradio/queueing.py",
        delete_when="Gradio drops the queued messages of a session that is closed.",
    ),
    UpstreamName(
        "gradio.state_holder.StateHolder.session_data",
        ("serve/page.py",),
        "set",
        why="The state of a session that ends is removed at once; Gradio keeps it for later requests of the session.",
        upstream="gradio/state_holder.py",
        delete_when="Gradio has a public call that deletes the state of one session.",
    ),
    UpstreamName(
        "gradio.state_holder.StateHolder.time_last_used",
        ("serve/page.py",),
        "set",
        why="The time of last use of a session that ends is removed together with the session's state.",
        upstream="gradio/state_holder.py",
        delete_when="Gradio has a public call that deletes the state of one session.",
    ),
    UpstreamName(
        "huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY",
        ("__init__.py",),
        "set",
        why="TRL reports each trainer to the Hub, whose client asks it for a list of programs; if the client was "
        "imported before dpokit, it has read its variable already.",
        upstream="huggingface_hub/constants.py",
        delete_when="huggingface_hub has a public call that switches its reports off.",
    ),
    UpstreamName(
        "huggingface_hub.constants.HF_HUB_OFFLINE",
        ("reachable_hub.py",),
        "set",
        why="A machine without the Hub would wait some 23 s for each file that is not in the cache.",
        upstream="huggingface_hub/constants.py",
        delete_when="huggingface_hub repeats no request to a server that refused the one before.",
    ),
    UpstreamName(
        "huggingface_hub.utils._http.logger",
        ("push/retry.py",),
        "read",
        why="A filter on this logger removes the queries of signed addresses from huggingface_hub's log lines; a "
        "filter on a parent logger does not see them.",
        upstream="huggingface_hub/utils/_http.py",
        delete_when="huggingface_hub logs addresses without their queries.",
    ),
    UpstreamName(
        "numpy._core.multiarray._reconstruct",
        ("checkpoint/pickles.py",),
        "read",
        why="Pickles of random states name this function, and only listed names may be loaded from a checkpoint's"
        " pickle.",
        upstream="numpy/_core/multiarray.py",
        delete_when="Checkpoints hold no pickles with numpy arrays.",
    ),
    UpstreamName(
        "optuna.trial.FrozenTrial._trial_id",
        ("sweep/study.py",),
        "read",
        why="optuna.trial.Trial needs this number to write to a trial that another process asked for.",
        upstream="optuna/trial/_frozen.py",
        delete_when="Optuna opens a trial for writing by its public number.",
    ),
    UpstreamName(
        "rich.console.Console.render_str",
        ("safe_console.py",),
        "override",
        why="rich prints the control characters of a text unchanged; the override shows them as letters before "
        "rich parses the text.",
        upstream="rich/console.py",
        delete_when="rich escapes control characters on request.",
    ),
    UpstreamName(
        "torch.UntypedStorage._cdata",
        ("plan/memory_ledger.py",),
        "read",
        why="The address of a storage is the key under which its bytes are counted; fake tensors have no data "
        "pointer of their own.",
        upstream="torch/storage.py",
        delete_when="torch gives a fake tensor's storage a public identity.",
    ),
    UpstreamName(
        "torch._appdirs.user_cache_dir",
        ("torch_build_locks.py",),
        "call",
        why="Each start looks for locks in torch's folder of compilations; torch.utils.cpp_extension, which names it in"
        " public, imports setuptools.",
        upstream="torch/_appdirs.py",
        delete_when="torch.utils.cpp_extension imports no setuptools, or torch's locks end with their processes.",
    ),
    UpstreamName(
        "torch._dynamo.eval_frame.OptimizedModule._orig_mod",
        ("distributed/placement.py",),
        "read",
        why="torch.compile wraps a model; the placement is read from the wrapped one.",
        upstream="torch/_dynamo/eval_frame.py",
        delete_when="torch unwraps a compiled model in public.",
    ),
    UpstreamName(
        "torch._subclasses.fake_tensor.FakeTensorMode",
        ("plan/trace.py",),
        "call",
        why="dpokit plan runs a training step on fake tensors, which have shapes and take no memory.",
        upstream="torch/_subclasses/fake_tensor.py",
        delete_when="torch exports FakeTensorMode under a public name.",
    ),
    UpstreamName(
        "torch._tensor._rebuild_from_type_v2",
        ("checkpoint/pickles.py",),
        "read",
        why="Checkpoints of torch name this function in their pickles, and only listed names may be loaded from a"
        " checkpoint's pickle.",
        upstream="torch/_tensor.py",
        delete_when="Checkpoints hold no pickles, or torch lists the safe names in public.",
    ),
    UpstreamName(
        "torch._utils._rebuild_parameter",
        ("checkpoint/pickles.py",),
        "read",
        why="Checkpoints of torch name this function in their pickles, and only listed names may be loaded from a"
        " checkpoint's pickle.",
        upstream="torch/_utils.py",
        delete_when="Checkpoints hold no pickles, or torch lists the safe names in public.",
    ),
    UpstreamName(
        "torch._utils._rebuild_tensor",
        ("checkpoint/pickles.py",),
        "read",
        why="Checkpoints of torch name this function in their pickles, and only listed names may be loaded from a"
        " checkpoint's pickle.",
        upstream="torch/_utils.py",
        delete_when="Checkpoints hold no pickles, or torch lists the safe names in public.",
    ),
    UpstreamName(
        "torch._utils._rebuild_tensor_v2",
        ("checkpoint/pickles.py",),
        "read",
        why="Checkpoints of torch name this function in their pickles, and only listed names may be loaded from a"
        " checkpoint's pickle.",
        upstream="torch/_utils.py",
        delete_when="Checkpoints hold no pickles, or torch lists the safe names in public.",
    ),
    UpstreamName(
        "torch._utils._rebuild_wrapper_subclass",
        ("checkpoint/pickles.py",),
        "read",
        why="Checkpoints of torch name this function in their pickles, and only listed names may be loaded from a"
        " checkpoint's pickle.",
        upstream="torch/_utils.py",
        delete_when="Checkpoints hold no pickles, or torch lists the safe names in public.",
    ),
    UpstreamName(
        "torch.cpu._is_amx_tile_supported",
        ("settings/load.py",),
        "call",
        why="bf16 is chosen on a CPU that computes it in hardware.",
        upstream="torch/cpu/__init__.py",
        delete_when="torch 2.10 is no longer supported: torch.cpu.get_capabilities is newer.",
    ),
    UpstreamName(
        "torch.cpu._is_avx512_bf16_supported",
        ("settings/load.py",),
        "call",
        why="bf16 is chosen on a CPU that computes it in hardware.",
        upstream="torch/cpu/__init__.py",
        delete_when="torch 2.10 is no longer supported: torch.cpu.get_capabilities is newer.",
    ),
    UpstreamName(
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        ("checkpoint/pickles.py",),
        "read",
        why="The table of a distributed checkpoint names this class in its pickle, and only listed names may be "
        "loaded from a checkpoint's pickle.",
        upstream="torch/distributed/checkpoint/filesystem.py",
        delete_when="Checkpoints hold no pickles, or torch lists the safe names in public.",
    ),
    UpstreamName(
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        ("checkpoint/pickles.py",),
        "read",
        why="The table of a distributed checkpoint names this enum in its pickle, and only listed names may be "
        "loaded from a checkpoint's pickle.",
        upstream="torch/distributed/checkpoint/metadata.py",
        delete_when="Checkpoints hold no pickles, or torch lists the safe names in public.",
    ),
    UpstreamName(
        "torch.distributed.distributed_c10d._get_default_store",
        ("distributed/coordination.py",),
        "call",
        why="Ranks tell each other through the default store why they end, also when a collective would hang; "
        "torch.distributed has no public access to that store.",
        upstream="torch/distributed/distributed_c10d.py",
        delete_when="torch.distributed returns the default store in public.",
    ),
    UpstreamName(
        "torch.nn.Module._buffers",
        ("plan/blueprint.py",),
        "set",
        why="Each buffer of a model on the meta device is replaced in place by a fake tensor.",
        upstream="torch/nn/modules/module.py",
        delete_when="torch turns a meta model into one of fake tensors in public.",
    ),
    UpstreamName(
        "torch.nn.Module._parameters",
        ("plan/blueprint.py",),
        "set",
        why="Each parameter of a model on the meta device is replaced in place by a fake tensor, also a 4-bit one"
        " of bitsandbytes.",
        upstream="torch/nn/modules/module.py",
        delete_when="torch turns a meta model into one of fake tensors in public.",
    ),
    UpstreamName(
        "torch.serialization._get_layout",
        ("checkpoint/pickles.py",),
        "read",
        why="The table of a distributed checkpoint names this function in its pickle, and only listed names may "
        "be loaded from a checkpoint's pickle.",
        upstream="torch/serialization.py",
        delete_when="Checkpoints hold no pickles, or torch lists the safe names in public.",
    ),
    UpstreamName(
        "torch.utils._python_dispatch.TorchDispatchMode",
        ("plan/memory_ledger.py",),
        "call",
        why="The memory ledger sees every operation of a traced step, and with it every new storage.",
        upstream="torch/utils/_python_dispatch.py",
        delete_when="torch exports TorchDispatchMode under a public name.",
    ),
    UpstreamName(
        "torch.utils._pytree.tree_leaves",
        ("plan/memory_ledger.py", "train/saving.py"),
        "call",
        why="It lists the tensors in nested dicts and lists: of an operation's result, and of the state that a "
        "checkpoint copies.",
        upstream="torch/utils/_pytree.py",
        delete_when="torch exports tree_leaves under a public name.",
    ),
    UpstreamName(
        "torch.utils._pytree.tree_map",
        ("model/rounding.py", "train/saving.py"),
        "call",
        why="It copies or casts every tensor in nested lists and dicts: the state that a checkpoint writes in the "
        "background, and an operation's arguments.",
        upstream="torch/utils/_pytree.py",
        delete_when="torch exports tree_map under a public name.",
    ),
    UpstreamName(
        "transformers.PreTrainedConfig._attn_implementation",
        ("model/score.py",),
        "read",
        why="Prompts are shared only if the model's attention is sdpa or dpokit's own; the configuration has no "
        "public name for the attention in use.",
        upstream="transformers/configuration_utils.py",
        delete_when="transformers gives the attention implementation of a model in public.",
    ),
    UpstreamName(
        "transformers.PreTrainedConfig._name_or_path",
        ("push/bundle.py",),
        "read",
        why="A config.json may hold this key; if its value is a local path, the key is removed before an upload.",
        upstream="transformers/configuration_utils.py",
        delete_when="No config.json holds this key any more.",
    ),
    UpstreamName(
        "transformers.PreTrainedModel._get_dtype_plan",
        ("model/tuned_folder.py",),
        "call",
        why="A tuned or merged model in 16 bits keeps those weights in fp32 that the model's class asks for.",
        upstream="transformers/modeling_utils.py",
        delete_when="transformers has a public call that converts a loaded model under its own dtype plan.",
    ),
    UpstreamName(
        "transformers.PreTrainedTokenizerBase.deprecation_warnings",
        ("model/load.py",),
        "set",
        why="A tokenizer warns once about a text that exceeds its limit; texts are cut after tokenising, and the limit "
        "must stay as it is, because it is saved with the tuned model.",
        upstream="transformers/tokenization_utils_base.py",
        delete_when="transformers has a public switch for this warning.",
    ),
    UpstreamName(
        "transformers.Trainer._determine_best_metric",
        ("train/resuming.py",),
        "override",
        why="After an evaluation that a signal cut short there are no metrics; the override then returns True, so"
        " that save_strategy best saves the step.",
        upstream="transformers/trainer.py",
        delete_when="transformers accepts an evaluation that ends without metrics.",
    ),
    UpstreamName(
        "transformers.Trainer._evaluate",
        ("train/resuming.py",),
        "override",
        why="An evaluation that a signal cuts short is recorded as due and its step saved; its loader draws from "
        "a copy of the random state.",
        upstream="transformers/trainer.py",
        delete_when="transformers can interrupt an evaluation and repeat it after a resume.",
    ),
    UpstreamName(
        "transformers.Trainer._get_grad_norm",
        ("train/steps.py",),
        "override",
        why="The override notes the first step whose gradient norm is not finite, on each rank.",
        upstream="transformers/trainer.py",
        delete_when="A callback receives the gradient norm of each step on every rank.",
    ),
    UpstreamName(
        "transformers.Trainer._globalstep_last_logged",
        ("train/resuming.py", "train/saving.py"),
        "set",
        why="A checkpoint keeps the step of the last log, from which the next log counts its steps, and a resumed"
        " run restores it; transformers begins anew.",
        upstream="transformers/trainer.py",
        delete_when="transformers saves and restores its logging state.",
    ),
    UpstreamName(
        "transformers.Trainer._initial_global_step",
        ("train/resuming.py", "train/saving.py"),
        "set",
        why="A checkpoint keeps the step at which training began, which the final mean loss is computed with, and"
        " a resumed run restores it; transformers begins anew.",
        upstream="transformers/trainer.py",
        delete_when="transformers saves and restores its logging state.",
    ),
    UpstreamName(
        "transformers.Trainer._load_best_model",
        ("train/resuming.py",),
        "override",
        why="The best checkpoint is loaded only after its writing has ended and its hashes match; the adapter "
        "keeps its dtype.",
        upstream="transformers/trainer.py",
        delete_when="transformers verifies a checkpoint before it loads it and keeps the adapter's dtype.",
    ),
    UpstreamName(
        "transformers.Trainer._load_from_checkpoint",
        ("train/resuming.py",),
        "override",
        why="PEFT loads an adapter in fp32, also where TRL trains it in bf16; the override restores the dtype.",
        upstream="transformers/trainer.py",
        delete_when="transformers passes autocast_adapter_dtype to PEFT.",
    ),
    UpstreamName(
        "transformers.Trainer._maybe_log_save_evaluate",
        ("train/resuming.py", "train/saving.py"),
        "override",
        why="The override keeps the last gradient norm and learning rate for the checkpoint; a resumed run calls "
        "it for a log at an epoch's end that was due.",
        upstream="transformers/trainer.py",
        delete_when="transformers writes a log that is due at an epoch's end before it saves there.",
    ),
    UpstreamName(
        "transformers.Trainer._run_epoch",
        ("train/resuming.py",),
        "override",
        why="A run that is resumed from its last step would train one step more; the override stops it first.",
        upstream="transformers/trainer.py",
        delete_when="transformers trains no step when a run is resumed at max_steps.",
    ),
    UpstreamName(
        "transformers.Trainer._save_checkpoint",
        ("train/saving.py",),
        "override",
        why="A checkpoint is written under another name, hashed, described in a manifest and then renamed, in the"
        " background where memory allows.",
        upstream="transformers/trainer.py",
        delete_when="transformers writes checkpoints that appear whole and verify.",
    ),
    UpstreamName(
        "transformers.Trainer._save_optimizer_and_scheduler",
        ("train/saving.py",),
        "call",
        why="It writes the shards of optimizer and schedule under DeepSpeed and FSDP2.",
        upstream="transformers/trainer.py",
        delete_when="transformers has a public call that saves the optimizer.",
    ),
    UpstreamName(
        "transformers.Trainer._save_rng_state",
        ("train/saving.py",),
        "call",
        why="It writes the random states of this rank into the checkpoint, as transformers' resume expects them.",
        upstream="transformers/trainer.py",
        delete_when="transformers has a public call that saves the random states.",
    ),
    UpstreamName(
        "transformers.Trainer._save_scaler",
        ("train/saving.py",),
        "call",
        why="It writes the state of fp16's gradient scaler under DeepSpeed and FSDP2.",
        upstream="transformers/trainer.py",
        delete_when="transformers has a public call that saves the gradient scaler.",
    ),
    UpstreamName(
        "transformers.Trainer._signature_columns",
        ("train/steps.py",),
        "set",
        why="transformers removes the columns of streamed rows that are not in this list; the collators need token ids "
        "and masks.",
        upstream="transformers/trainer.py",
        delete_when="The Trainer takes the columns to keep as an argument.",
    ),
    UpstreamName(
        "transformers.Trainer._total_loss_scalar",
        ("train/resuming.py", "train/saving.py"),
        "set",
        why="A checkpoint keeps the sum of all logged losses, which the final mean loss is computed from, and a "
        "resumed run restores it; transformers begins anew.",
        upstream="transformers/trainer.py",
        delete_when="transformers saves and restores its logging state.",
    ),
    UpstreamName(
        "transformers.Trainer._tr_loss",
        ("train/resuming.py", "train/saving.py"),
        "set",
        why="A checkpoint keeps the sum of the losses since the last log, and a resumed run restores it; "
        "transformers begins anew.",
        upstream="transformers/trainer.py",
        delete_when="transformers saves and restores its logging state.",
    ),
    UpstreamName(
        "transformers.Trainer.create_accelerator_and_postprocess",
        ("train/steps.py",),
        "override",
        why="Just before transformers builds its Accelerator, FSDP2 is made possible on CPU processes.",
        upstream="transformers/trainer.py",
        delete_when="accelerate supports FSDP on CPU processes.",
    ),
    UpstreamName(
        "transformers.Trainer.evaluation_loop",
        ("train/steps.py",),
        "override",
        why="transformers averages the losses of batches; the override reports the mean over real pairs or tokens.",
        upstream="transformers/trainer.py",
        delete_when="transformers weighs each evaluation batch by its items.",
    ),
    UpstreamName(
        "transformers.Trainer.get_batch_samples",
        ("train/steps.py",),
        "override",
        why="The override adds up the pairs or tokens of a step over its micro-batches and ranks, by which each "
        "loss is weighed.",
        upstream="transformers/trainer.py",
        delete_when="TRL's trainers weigh a step's loss by pairs or tokens of all ranks and micro-batches.",
    ),
    UpstreamName(
        "transformers.Trainer.save_model._internal_call",
        ("train/saving.py",),
        "call",
        why="With it save_model writes the shards of a checkpoint without a push to the Hub.",
        upstream="transformers/trainer.py",
        delete_when="transformers writes a model without a push by a public argument.",
    ),
    UpstreamName(
        "transformers.TrainingArguments._n_gpu",
        ("settings/load.py",),
        "set",
        why="One process that sees several GPUs uses one; with more, transformers would split each batch by "
        "DataParallel.",
        upstream="transformers/training_args.py",
        delete_when="transformers has a flag that switches DataParallel off.",
    ),
    UpstreamName(
        "transformers.integrations.hub_kernels._kernels_enabled",
        ("__init__.py",),
        "set",
        why="transformers downloads programs for some models from the Hub; if it was imported before dpokit, it has "
        "read its variable already.",
        upstream="transformers/integrations/hub_kernels.py",
        delete_when="transformers downloads programs only on request.",
    ),
    UpstreamName(
        "transformers.utils.hub.cached_files._raise_exceptions_for_connection_errors",
        ("model/check.py",),
        "call",
        why="A file that is neither cached nor reachable counts as missing; callers decide what its absence means.",
        upstream="transformers/utils/hub.py",
        delete_when="cached_file has a public argument that returns None for a file it cannot reach.",
    ),
    UpstreamName(
        "transformers.utils.hub.cached_files._raise_exceptions_for_missing_entries",
        ("model/check.py",),
        "call",
        why="A file that a model does not have is answered by None, not by an error.",
        upstream="transformers/utils/hub.py",
        delete_when="cached_file has a public argument that returns None for a missing file.",
    ),
    UpstreamName(
        "trl.DPOTrainer._metrics",
        ("train/steps.py",),
        "set",
        why="TRL logs the plain mean of what this dict holds; the means over real rows of all ranks take its "
        "place before each log.",
        upstream="trl/trainer/dpo_trainer.py",
        delete_when="TRL keeps sums and counts and gathers them once per log.",
    ),
    UpstreamName(
        "trl.DPOTrainer._precompute_engine",
        ("train/scoring.py",),
        "set",
        why="TRL builds a DeepSpeed engine once to score the reference before training; dpokit's own scoring "
        "builds and keeps the same one.",
        upstream="trl/trainer/dpo_trainer.py",
        delete_when="TRL has a public call that scores the reference in batches.",
    ),
    UpstreamName(
        "trl.DPOTrainer._precompute_ref_logps",
        ("train/scoring.py",),
        "override",
        why="The override keeps reference log-probs in a cache that later runs share and that survives an "
        "interruption; TRL computes them anew for another learning rate.",
        upstream="trl/trainer/dpo_trainer.py",
        delete_when="TRL's cache depends only on what the scores depend on, and is written in parts.",
    ),
    UpstreamName(
        "trl.DPOTrainer._prepare_dataset",
        ("train/steps.py",),
        "override",
        why="Rows arrive tokenised and cut, so TRL's own preparation is left out.",
        upstream="trl/trainer/dpo_trainer.py",
        delete_when="DPOTrainer accepts tokenised rows without another pass over them.",
    ),
    UpstreamName(
        "trl.DPOTrainer._set_signature_columns_if_needed",
        ("train/steps.py",),
        "override",
        why="The columns of streamed rows to keep are token ids and masks; TRL's list has no masks.",
        upstream="trl/trainer/dpo_trainer.py",
        delete_when="The Trainer takes the columns to keep as an argument.",
    ),
    UpstreamName(
        "trl.DPOTrainer._total_train_tokens",
        ("train/resuming.py", "train/saving.py", "train/steps.py"),
        "set",
        why="A checkpoint keeps TRL's count of trained tokens and a resumed run restores it; batches that repeat "
        "rows do not count.",
        upstream="trl/trainer/dpo_trainer.py",
        delete_when="TRL saves and restores its token count and leaves repeated rows out.",
    ),
    UpstreamName(
        "trl.DPOTrainer.compute_ref_log_probs",
        ("train/scoring.py",),
        "override",
        why="The override removes dpokit's own keys from the batch and computes each prompt once.",
        upstream="trl/trainer/dpo_trainer.py",
        delete_when="TRL computes a pair's prompt once and takes batches with other columns.",
    ),
    UpstreamName(
        "trl.DPOTrainer.create_model_card",
        ("train/steps.py",),
        "override",
        why="TRL writes a model card without results beside each checkpoint; dpokit writes one from the finished run.",
        upstream="trl/trainer/base_trainer.py",
        delete_when="A flag switches TRL's model card off.",
    ),
    UpstreamName(
        "trl.SFTTrainer._metrics",
        ("train/steps.py",),
        "set",
        why="TRL logs the plain mean of what this dict holds; the means over real rows of all ranks take its "
        "place before each log.",
        upstream="trl/trainer/sft_trainer.py",
        delete_when="TRL keeps sums and counts and gathers them once per log.",
    ),
    UpstreamName(
        "trl.SFTTrainer._prepare_dataset",
        ("train/steps.py",),
        "override",
        why="Rows arrive tokenised and cut, so TRL's own preparation is left out.",
        upstream="trl/trainer/sft_trainer.py",
        delete_when="SFTTrainer accepts tokenised rows without another pass over them.",
    ),
    UpstreamName(
        "trl.SFTTrainer._set_signature_columns_if_needed",
        ("train/steps.py",),
        "override",
        why="The columns of streamed rows to keep are token ids and masks, not the model's inputs.",
        upstream="trl/trainer/sft_trainer.py",
        delete_when="The Trainer takes the columns to keep as an argument.",
    ),
    UpstreamName(
        "trl.SFTTrainer._total_train_tokens",
        ("train/resuming.py", "train/saving.py", "train/steps.py"),
        "set",
        why="A checkpoint keeps TRL's count of trained tokens and a resumed run restores it; batches that repeat "
        "rows do not count.",
        upstream="trl/trainer/sft_trainer.py",
        delete_when="TRL saves and restores its token count and leaves repeated rows out.",
    ),
    UpstreamName(
        "trl.kernels.ChunkedLogProbFunction",
        ("plan/trace.py",),
        "call",
        why="dpokit plan traces the memory of the head that TRL trains with.",
        upstream="trl/kernels/chunked_logprob.py",
        delete_when="trl exports it from its top package.",
    ),
    UpstreamName(
        "trl.models.prepare_deepspeed",
        ("train/scoring.py",),
        "call",
        why="It builds the DeepSpeed engine in which the reference is scored before training.",
        upstream="trl/models/utils.py",
        delete_when="trl exports it from its top package.",
    ),
    UpstreamName(
        "trl.trainer.dpo_trainer.DataCollatorForPreference",
        ("model/score.py",),
        "call",
        why="It pads tokenised pairs to the batches that TRL's loss expects.",
        upstream="trl/trainer/dpo_trainer.py",
        delete_when="trl exports it from its top package.",
    ),
    UpstreamName(
        "trl.trainer.sft_trainer.DataCollatorForLanguageModeling",
        ("train/sft_trainer.py",),
        "call",
        why="It pads tokenised rows to the batches that TRL's loss expects.",
        upstream="trl/trainer/sft_trainer.py",
        delete_when="trl exports it from its top package.",
    ),
    UpstreamName(
        "trl.trainer.utils._use_triton",
        ("model/score.py",),
        "set",
        why="TRL's head scores only answer positions where Triton runs and every position elsewhere; the "
        "replacement scores only answer positions on CPU, too. Packed rows have no others, so it selects none: a GPU "
        "would wait for their number.",
        upstream="trl/trainer/utils.py",
        delete_when="TRL selects answer positions on CPU, and takes their indices.",
    ),
    UpstreamName(
        "trl.trainer.utils.add_fused_lm_head.fused_lm_head",
        ("model/shared_prefix.py",),
        "override",
        why="A model's forward that is asked for TRL's fused head packs each pair, so that its prompt is computed"
        " once.",
        upstream="trl/trainer/utils.py",
        delete_when="TRL computes a pair's prompt once.",
    ),
    UpstreamName(
        "typer.core.TyperCommand.shell_complete",
        ("verbs/common.py",),
        "override",
        why="A verb passes unknown flags on to training, and Typer completes only the verb's own; the override adds "
        "the training flags.",
        upstream="typer/_click/core.py",
        delete_when="Typer completes the flags that a command passes on.",
    ),
    UpstreamName(
        "uvicorn.Server.startup",
        ("serve/app.py",),
        "override",
        why="The override prints the page's address once the server accepts connections.",
        upstream="uvicorn/server.py",
        delete_when="uvicorn calls a function when it is ready.",
    ),
    UpstreamName(
        "uvicorn.protocols.http.h11_impl.H11Protocol.conn",
        ("serve/connections.py",),
        "read",
        why="The state of h11's connection says whether a request is complete.",
        upstream="uvicorn/protocols/http/h11_impl.py",
        delete_when="uvicorn bounds connections per address and the time for a request and for an answer.",
    ),
    UpstreamName(
        "uvicorn.protocols.http.h11_impl.H11Protocol.connection_lost",
        ("serve/connections.py",),
        "override",
        why="The override counts a closed connection and ends its timers.",
        upstream="uvicorn/protocols/http/h11_impl.py",
        delete_when="uvicorn bounds connections per address and the time for a request and for an answer.",
    ),
    UpstreamName(
        "uvicorn.protocols.http.h11_impl.H11Protocol.connection_made",
        ("serve/connections.py",),
        "override",
        why="The override refuses a connection above the limits and begins the timer of its first request.",
        upstream="uvicorn/protocols/http/h11_impl.py",
        delete_when="uvicorn bounds connections per address and the time for a request and for an answer.",
    ),
    UpstreamName(
        "uvicorn.protocols.http.h11_impl.H11Protocol.data_received",
        ("serve/connections.py",),
        "override",
        why="The override starts or stops the timer of the request that arrives.",
        upstream="uvicorn/protocols/http/h11_impl.py",
        delete_when="uvicorn bounds connections per address and the time for a request and for an answer.",
    ),
    UpstreamName(
        "uvicorn.protocols.http.h11_impl.H11Protocol.on_response_complete",
        ("serve/connections.py",),
        "override",
        why="The override begins the timer of the next request on the same connection.",
        upstream="uvicorn/protocols/http/h11_impl.py",
        delete_when="uvicorn bounds connections per address and the time for a request and for an answer.",
    ),
    UpstreamName(
        "uvicorn.protocols.http.h11_impl.H11Protocol.pause_writing",
        ("serve/connections.py",),
        "override",
        why="The override begins the timer of a reader that takes no data.",
        upstream="uvicorn/protocols/http/h11_impl.py",
        delete_when="uvicorn bounds connections per address and the time for a request and for an answer.",
    ),
    UpstreamName(
        "uvicorn.protocols.http.h11_impl.H11Protocol.resume_writing",
        ("serve/connections.py",),
        "override",
        why="The override ends the timer of a reader that takes data again.",
        upstream="uvicorn/protocols/http/h11_impl.py",
        delete_when="uvicorn bounds connections per address and the time for a request and for an answer.",
    ),
    UpstreamName(
        "yaml.SafeLoader.construct_mapping",
        ("settings/layers.py",),
        "override",
        why="PyYAML keeps the last of two equal keys; the override reports a flag that is set twice.",
        upstream="yaml/constructor.py",
        delete_when="PyYAML refuses equal keys.",
    ),
)
