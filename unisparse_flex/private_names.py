"""torch's private names that the library uses: they may move in any release."""

from __future__ import annotations

from importlib import import_module

# "module" or "module:attribute.attribute"; a test compares them with the sources.
PRIVATE_NAMES = (
    "torch._dynamo:mark_static_address",
    "torch._dynamo.eval_frame:_TorchDynamoContext",
    "torch._dynamo.source:AttrSource",
    "torch._dynamo.symbolic_convert:InstructionTranslator",
    "torch._dynamo.utils:counters",
    "torch._dynamo.variables.torch_function:TorchFunctionModeStackVariable",
    "torch._inductor.compile_fx:compile_fx",
    "torch._inductor.custom_graph_pass:CustomGraphPass",
    "torch._inductor.output_code:CompiledFxGraph",
    "torch._inductor:config",
    "torch.fx:_symbolic_trace.is_fx_symbolic_tracing",
    "torch.utils:_pytree.tree_map",
    "torch.utils._python_dispatch:_disable_current_modes",
    "torch:Tensor._make_wrapper_subclass",
    "torch._inductor:config._config",
    "torch.nn:Module._compiled_call_impl",
    "torch:ops.aten.add.Tensor._schema",
    "torch._subclasses.fake_tensor:is_fake",
    "torch._C._dynamo.guards:_empty_strided_cuda",
    "torch:_C.DispatchKey",
    "torch:_C._SetExcludeDispatchKeyGuard",
    "torch:_C._disabled_torch_function_impl",
    "torch:_C._dispatch_has_backend_fallback",
    "torch:_C._dispatch_tls_is_dispatch_key_included",
    "torch:_C._dispatch_tls_set_dispatch_key_included",
    "torch:_C.DisableTorchFunction",
    "torch:_C._functorch.is_functorch_wrapped_tensor",
    "torch:_C._functorch.peek_interpreter_stack",
    "torch:_C._get_function_stack_at",
    "torch:_C._len_torch_dispatch_stack",
    "torch:_C._len_torch_function_stack",
    "torch:_C._nn.scaled_dot_product_attention",
    "torch:_C._parse_dispatch_key",
    "torch:_C._pop_torch_function_stack",
    "torch:_C._push_on_torch_function_stack",
    "torch:_dynamo.OptimizedModule",
    "torch:_guards.CompileContext.current_compile_id",
    "torch:_guards.Guard",
    "torch:_guards.TracingContext.get",
    "torch:_guards.TracingContext.try_get",
    "torch:_nested_tensor_from_mask_left_aligned",
    "torch:_ops.HigherOrderOperator",
    "torch:_ops.OpOverload",
    "torch:_ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS",
    "torch:_ops._higher_order_ops",
    "torch:_transformer_encoder_layer_fwd",
)
# Attributes that only instances have.
INSTANCE_ATTRIBUTES = ("_base", "_orig_mod", "_version")
WORKING_TORCH = "2.11 to 2.14"


def is_present(name: str) -> bool:
    """Whether torch has one of `PRIVATE_NAMES`."""
    module, _, attributes = name.partition(":")
    try:
        found: object = import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except ImportError as error:
        # A package that torch itself does not find says nothing of its names.
        return not (error.name or "torch").startswith("torch")
    except AttributeError:
        return False
    return True


def missing_names() -> list[str]:
    """Those of `PRIVATE_NAMES` that this torch does not have."""
    return [name.replace(":", ".") for name in PRIVATE_NAMES if not is_present(name)]


def explain_failed_import(error: Exception) -> Exception:
    """What to raise where importing the library failed: an ImportError if torch lacks names."""
    missing = missing_names()
    if not missing:
        return error
    import torch

    return ImportError(
        f"unisparse_flex needs private names that torch {torch.__version__} does not have: "
        f"{', '.join(missing)}; install a torch that works with this release: {WORKING_TORCH}"
    )
