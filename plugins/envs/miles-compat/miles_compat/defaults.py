"""What `args` says where the run has no such setting: upstream's own defaults, flag by flag.

Attributes are flags with underscores; a flag `disable-x` of upstream is the attribute `x`. A test compares them with
the list of upstream's flags in this repository.
"""

from __future__ import annotations

from typing import Any

UNSET = """
    critic_num_nodes critic_num_gpus_per_node offload_train_disk_dir custom_model_provider_path mfu_peak_tflops
    model_name rollout_function_path mooncake_store_init_kwargs dynamic_sampling_filter_path
    rollout_submission_granularity max_weight_staleness async_max_concurrent_samples
    custom_async_data_buffer_path custom_generate_function_path custom_rollout_log_function_path
    custom_eval_rollout_log_function_path buffer_filter_path rollout_data_postprocess_path
    rollout_external_engine_addrs update_weight_disk_dir update_weight_local_checkpoint_dir
    custom_update_weight_post_write_path ft_components debug_exit_after_rollout chat_template_path
    multimodal_keys start_rollout_id eval_function_path eval_prompt_data eval_config eval_max_prompt_len
    eval_max_context_len eval_hf_dir ref_ckpt_step save_trigger_sentinel custom_megatron_post_save_hook_path
    critic_save eps_clip_high eps_clip_c custom_loss_function_path ref_update_interval custom_tis_function_path
    custom_pg_loss_reducer_function_path opd_type opd_teacher_ckpt_step target_modules exclude_modules
    lora_adapter_path multi_lora_http_server_path multi_lora_backend_path
    multi_lora_max_adapter_global_batch_size miles_router_timeout miles_router_max_connections wandb_mode
    wandb_dir wandb_key wandb_host wandb_team wandb_group wandb_project log_reward_category wandb_run_id
    mlflow_tracking_uri mlflow_run_name mlflow_run_id tb_project_name tb_experiment_name prometheus_run_name
    save_debug_rollout_data save_debug_trajectory_data load_debug_rollout_data load_debug_rollout_data_subsample
    save_debug_train_data save_debug_event_data dump_details dumper_inference dumper_fwd_only dumper_fwd_bwd
    dumper_source_patcher_config_inference dumper_source_patcher_config_train memory_snapshot_num_steps
    check_weight_update_skip_list ci_ft_test_actions ci_inject_rollout_data_path
    ci_inject_rollout_data_start_rollout_id http_proxy reward_key eval_reward_key rm_url custom_rm_path
    custom_reward_post_process_path custom_convert_samples_to_train_data_path rollout_buffer_url
    rollout_sample_filter_path rollout_all_samples_process_path custom_megatron_init_path
    custom_megatron_before_log_prob_hook_path custom_megatron_before_train_step_hook_path mtp_num_layers
    prefill_num_servers ci_metric_checker_key ci_metric_checker_threshold ci_save_grad_norm ci_load_grad_norm
    session_server_ip session_server_port custom_config_path padded_vocab_size sglang_router_ip
    sglang_router_port sglang_router_policy sglang_config
"""
"""None upstream."""

OFF = """
    offload stream_optimizer_state_to_disk true_on_policy_mode recompute_logprobs_via_prefill
    debug_skip_weight_update debug_disable_optimizer rematerialize_param_from_master_weight
    check_rematerialize_param_from_master_weight recompute_loss_function indep_dp delay_split_train_data_by_dp
    allgather_cp low_memory_resume fully_async rollout_skip_special_tokens partial_rollout
    mask_offpolicy_in_partial_rollout keep_old_actor pin_rollout_manager_to_head rollout_external
    use_fault_tolerance mini_ft_controller_enable balance_data balance_by_flops allow_partial_train_step
    skip_eval_before_train async_save no_save_optim calculate_per_token_loss use_kl_loss use_rollout_entropy
    observe_training_entropy get_mismatch_metrics reset_optimizer_states use_rollout_logprobs
    skip_actor_forward_only use_tis use_routing_replay use_rollout_routing_replay use_indexer_replay
    use_rollout_indexer_replay use_opsm use_opd opd_topk_per_position lora_sync_from_tensor lora_base_cpu_backup
    lora_train_only experts_shared_outer_loras use_miles_router use_wandb wandb_always_use_train_step
    log_multi_turn log_passrate log_correct_samples use_mlflow use_tensorboard use_prometheus debug_rollout_only
    debug_train_only dumper_enable check_weight_update_equal check_weight_update_allow_quant_error
    check_lora_weight_equal save_local_weight_checksum enable_event_analyzer enable_witness
    debug_deterministic_collective use_distributed_post group_rm disable_rollout_trim_samples
    use_dynamic_global_batch_size freeze_indexer enable_mtp_training ci_test ci_disable_kl_checker
    ci_disable_logprobs_checker ci_disable_weight_update_checker ci_save_model_hash ci_check_model_hash
    use_session_server use_miles_dashboard
"""
"""False upstream."""

ON = """
    rollout_global_dataset compute_advantages_and_returns grpo_std_normalization rewards_normalization
    wandb_random_suffix
"""
"""True upstream."""

VALUES: dict[str, Any] = {
    "num_gpus_per_node": 8,
    "offload_train_target": "cpu",
    "stream_optimizer_state_moment_dtype": "fp32",
    "offload_train_disk_chunk_mb": 256,
    "distributed_backend": "nccl",
    "distributed_timeout_minutes": 10,
    "qkv_format": "thd",
    "linear_attention_backend": "fla",
    "miles_dsa_topk_backend": "torch",
    "train_memory_margin_bytes": 1073741824,
    "megatron_to_hf_mode": "raw",
    "dsa_attention_backend": "tilelang",
    "extra_high_precision_layers_hf": (),
    "extra_high_precision_layers_megatron": (),
    "object_store_backend": "ray",
    "mooncake_replica_num": 1,
    "async_data_buffer_capacity_factor": 2.0,
    "async_unused_samples_handler": "drop",
    "pause_generation_mode": "retract",
    "update_weight_delta_encoding": "xor",
    "update_weight_delta_checksum": "xxh3-128",
    "p2p_transfer_num_workers": 4,
    "p2p_transfer_timeout": 30.0,
    "rollout_health_check_interval": 30.0,
    "rollout_health_check_timeout": 30.0,
    "rollout_health_check_first_wait": 0,
    "control_server_port": 0,
    "mini_ft_controller_poll_interval": 10.0,
    "mini_ft_controller_resume_delay": 10.0,
    "eval_num_gpus": 0,
    "eval_num_gpus_per_engine": 1,
    "eval_max_in_flight": 2,
    "eval_overflow_policy": "backpressure",
    "eval_keep_snapshots": 2,
    "eps_clip": 0.2,
    "loss_type": "policy_loss",
    "gamma": 1.0,
    "lambd": 1.0,
    "tis_clip": 2.0,
    "tis_clip_low": 0,
    "opsm_delta": 0.0001,
    "opd_kl_coef": 1.0,
    "opd_log_prob_top_k": 0,
    "opd_top_k_strategy": "only-student",
    "opd_reward_weight_mode": "student_p",
    "lora_rank": 0,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_type": "lora",
    "multi_lora_n_adapters": 0,
    "multi_lora_adapter": [],
    "multi_lora_idle_poll_s": 5.0,
    "multi_lora_api_port": 8068,
    "multi_lora_max_coalesce_wait_s": 0.5,
    "multi_lora_max_empty_wait_s": 30.0,
    "miles_router_health_check_failure_threshold": 3,
    "mlflow_experiment_name": "miles",
    "dumper_dir": "/tmp/dumper",
    "memory_snapshot_dir": ".",
    "memory_recorder": "torch",
    "check_weight_update_selector": "all",
    "witness_buffer_size": 1048576,
    "ci_inject_rollout_data_min_match_ratio": 0.9,
    "fetch_trajectory_retry_times": -1,
    "min_batch_collection_ratio": 1,
    "rollout_task_type": "math",
    "loss_mask_type": "qwen",
    "data_pad_size_multiplier": 128,
    "mtp_loss_scaling_factor": 0.2,
    "tito_model": "default",
    "session_message_matcher": "strict",
    "sglang_router_request_timeout_secs": 14400,
}

FURTHER: dict[str, Any] = {
    "eval_datasets": None,
    "pipeline_model_parallel_size": 1,
    "rollout_sample_hook_path": None,
    "router_policy": None,
    "sglang_dp_size": 1,
    "sglang_enable_deterministic_inference": False,
    "sglang_model_routers": None,
    "sglang_speculative_algorithm": None,
    "tensor_model_parallel_size": 1,
}
"""Attributes that no flag of upstream's own list stands for, which its functions read all the same."""

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(UNSET.split()),
    **dict.fromkeys(OFF.split(), False),
    **dict.fromkeys(ON.split(), True),
    **VALUES,
    **FURTHER,
}
