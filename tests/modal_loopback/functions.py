"""RPCs about functions and classes: made, looked up, bound to parameters."""

from __future__ import annotations

from typing import Any, Protocol

from modal_proto import api_pb2

from tests.modal_loopback.containers import schedule
from tests.modal_loopback.state import Function, Plane, Table, not_found

FORMATS = (api_pb2.DATA_FORMAT_PICKLE, api_pb2.DATA_FORMAT_CBOR)
OPTIONS = ("concurrency_limit", "timeout_secs", "task_idle_timeout_secs", "max_concurrent_inputs")
AUTOSCALER = {
    "concurrency_limit": "max_containers",
    "warm_pool_size": "min_containers",
    "task_idle_timeout_secs": "scaledown_window",
    "buffer_containers": "buffer_containers",
}


class Lookup(Protocol):
    """What requests by the name of a deployed app have in common."""

    environment_name: str
    app_name: str
    object_tag: str


def describe(function: Function, definition: Any) -> api_pb2.FunctionHandleMetadata:
    """What a client must know of a function; the definition is a Function or the request before it."""
    metadata = api_pb2.FunctionHandleMetadata(
        function_name=definition.function_name,
        function_type=definition.function_type,
        definition_id=f"de-{function.id}",
        function_schema=definition.function_schema,
        supported_input_formats=definition.supported_input_formats,
        supported_output_formats=definition.supported_output_formats,
    )
    if hasattr(definition, "class_parameter_info"):
        metadata.class_parameter_info.CopyFrom(definition.class_parameter_info)
    for name, method in definition.method_definitions.items():
        metadata.method_handle_metadata[name].CopyFrom(describe_method(function, name, method))
    return metadata


def describe_method(function: Function, name: str, method: api_pb2.MethodDefinition) -> api_pb2.FunctionHandleMetadata:
    """What a client must know of one method of a class."""
    return api_pb2.FunctionHandleMetadata(
        function_name=method.function_name,
        function_type=method.function_type,
        is_method=True,
        use_method_name=name,
        definition_id=f"de-{function.id}",
        function_schema=method.function_schema,
        supported_input_formats=method.supported_input_formats or FORMATS,
        supported_output_formats=method.supported_output_formats or FORMATS,
    )


def function_data(function: Function) -> api_pb2.FunctionData:
    """A function in the form that modal 1.6 asks for."""
    definition = function.definition
    return api_pb2.FunctionData(
        function_name=definition.function_name,
        function_type=definition.function_type,
        is_class=definition.is_class,
        method_definitions=definition.method_definitions,
        autoscaler_settings=definition.autoscaler_settings,
        ranked_functions=[api_pb2.FunctionData.RankedFunction(rank=0, function=definition)],
    )


def existing_or_new(plane: Plane, function_id: str, app_id: str) -> Function:
    """The function that a deployment replaces, or a new one."""
    function = plane.functions.get(function_id) or Function(plane.new_id("fu"), plane.apps[app_id])
    plane.functions[function.id] = function
    return function


def precreate(plane: Plane, req: api_pb2.FunctionPrecreateRequest) -> api_pb2.FunctionPrecreateResponse:
    function = existing_or_new(plane, req.existing_function_id, req.app_id)
    function.metadata = describe(function, req)
    return api_pb2.FunctionPrecreateResponse(function_id=function.id, handle_metadata=function.metadata)


def create(plane: Plane, req: api_pb2.FunctionCreateRequest) -> api_pb2.FunctionCreateResponse:
    """Keep a definition; a list of GPUs comes as ranked definitions, of which the first is taken."""
    function = existing_or_new(plane, req.existing_function_id, req.app_id)
    ranked = req.function_data.ranked_functions
    function.definition = ranked[0].function if ranked else req.function
    function.metadata = describe(function, function.definition)
    created = api_pb2.FunctionCreateResponse(
        function_id=function.id, handle_metadata=function.metadata, function=function.definition
    )
    if "function_data" in created.DESCRIPTOR.fields_by_name:  # since modal 1.6
        created.function_data.CopyFrom(function_data(function))
    return created


def bind(plane: Plane, req: api_pb2.FunctionBindParamsRequest) -> api_pb2.FunctionBindParamsResponse:
    """A class with parameters or options: containers of its own that run the same code."""
    base = plane.functions[req.function_id]
    given = (base.definition, req.function_options)
    definition, options = (message.SerializeToString(deterministic=True) for message in given)
    key = (base.id, definition, req.serialized_params, options)
    if key not in plane.variants:
        variant = Function(plane.new_id("fu"), base.app, base=base, serialized_params=req.serialized_params)
        variant.definition = apply_options(base.definition, req.function_options)
        variant.metadata = describe(variant, variant.definition)
        plane.variants[key] = plane.functions[variant.id] = variant
        schedule(plane, variant)
    found = plane.variants[key]
    return api_pb2.FunctionBindParamsResponse(bound_function_id=found.id, handle_metadata=found.metadata)


def apply_options(base: api_pb2.Function, options: api_pb2.FunctionOptions) -> api_pb2.Function:
    """A definition with the options of `with_options` in place of its own."""
    definition = api_pb2.Function()
    definition.CopyFrom(base)
    for name in OPTIONS:
        if options.HasField(name):  # type: ignore[arg-type]
            setattr(definition, name, getattr(options, name))
    for name, target in AUTOSCALER.items():
        if options.HasField(name):  # type: ignore[arg-type]
            setattr(definition.autoscaler_settings, target, getattr(options, name))
    if options.HasField("resources"):
        definition.resources.CopyFrom(options.resources)
    if options.replace_secret_ids:
        definition.secret_ids[:] = options.secret_ids
    if options.replace_volume_mounts:
        del definition.volume_mounts[:]
        definition.volume_mounts.extend(options.volume_mounts)
    return definition


def create_class(plane: Plane, req: api_pb2.ClassCreateRequest) -> api_pb2.ClassCreateResponse:
    class_id = req.existing_class_id or plane.new_id("cs")
    return api_pb2.ClassCreateResponse(class_id=class_id, handle_metadata=api_pb2.ClassHandleMetadata())


def look_up(plane: Plane, req: Lookup, kind: str) -> str:
    """The id of a function or class of a deployed app."""
    app = plane.deployed.get((req.environment_name or "main", req.app_name))
    if app is None:
        raise not_found(f"App {req.app_name!r}")
    table: dict[str, str] = dict(app.layout.class_ids if kind == "Class" else app.layout.function_ids)
    if req.object_tag not in table:
        raise not_found(f"{kind} {req.object_tag!r} in app {req.app_name!r}")
    return table[req.object_tag]


def get_class(plane: Plane, req: api_pb2.ClassGetRequest) -> api_pb2.ClassGetResponse:
    found = look_up(plane, req, "Class")
    return api_pb2.ClassGetResponse(class_id=found, handle_metadata=api_pb2.ClassHandleMetadata())


def get_function(plane: Plane, req: api_pb2.FunctionGetRequest) -> api_pb2.FunctionGetResponse:
    function = plane.functions[look_up(plane, req, "Function")]
    found = api_pb2.FunctionGetResponse(function_id=function.id, handle_metadata=function.metadata)
    if "function" in found.DESCRIPTOR.fields_by_name:  # since modal 1.6
        found.function.CopyFrom(function_data(function))
    return found


def stats(plane: Plane, req: api_pb2.FunctionGetCurrentStatsRequest) -> api_pb2.FunctionStats:
    function = plane.functions[req.function_id]
    running = sum(len(task.running) for task in function.tasks.values())
    backlog, tasks = len(function.queue), sum(task.is_alive for task in function.tasks.values())
    return api_pb2.FunctionStats(backlog=backlog, num_total_tasks=tasks, num_running_inputs=running)


def update_autoscaler(
    plane: Plane, req: api_pb2.FunctionUpdateSchedulingParamsRequest
) -> api_pb2.FunctionUpdateSchedulingParamsResponse:
    function = plane.functions[req.function_id]
    function.definition.autoscaler_settings.MergeFrom(req.settings)
    schedule(plane, function)
    return api_pb2.FunctionUpdateSchedulingParamsResponse(current_settings=function.definition.autoscaler_settings)


FUNCTIONS: Table = {
    "FunctionPrecreate": precreate,
    "FunctionCreate": create,
    "FunctionBindParams": bind,
    "FunctionGet": get_function,
    "FunctionGetCurrentStats": stats,
    "FunctionUpdateSchedulingParams": update_autoscaler,
    "ClassCreate": create_class,
    "ClassGet": get_class,
}
