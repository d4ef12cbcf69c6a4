"""An HTTP server with OpenAI's interface over one wrapped model: `autotune serve MODEL`.

    fields      what bodies are made of: null is left out, an unknown field is refused by name
    forms       the forms that an answer may be held to
    schema      the bodies of requests
    validation  what is wrong with a body, in a sentence with the field's name
    prompts     a body's prompt as token ids, and the room that is left for an answer
    sampling    a body's sampling parameters as options of generate
    detokenise  tokens to text, piece by piece: no half characters, no stop strings
    pieces      an answer's tokens as pieces of text with log-probabilities, and why it ended
    answering   one request to the model: pieces of its answer as they come
    completions answers in OpenAI's forms, whole and streamed
    metrics     counters and histograms in Prometheus' text format
    exposition  what of them is read when Prometheus asks
    timing      when the parts of an answer happened
    logs        the log: a JSON object a line, with the request's id
    watching    lines of tuning, and figures once a second for all who watch
    switching   back to the original and to the plan again, on the word of the page or of an operator
    page        the page at `/`: the plan and why, phases, trials, figures as they change
    rollout     a new plan on many replicas: one serves its share with it, then all do, or none
    keys        API keys: where they come from, and which can be used
    gate        what every request passes: keys, limits of size and time, ids, counting
    openapi     the interface as a schema, with answers and errors
    app         the routes
    connection  one client's connection, which has to say what it wants in time
    run         loads and tunes the model, serves, drains
    load        `autotune bench-serve`: how long the clients of a server wait

Read in this order. The package needs the extra `serve`: pip install "autotune-inference[serve]".
"""
