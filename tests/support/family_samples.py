"""Raw rows of each family of datasets, made up in the layout that the published files have: one for each number."""


def _messages(i, answer="Yes", **more):
    return [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer, **more}]


def _from(*turns):
    return [{"from": role, "value": value} for role, value in turns]


def _annotation(rating):
    return {"Rating": rating, "Rationale": "It is so."}


def ultrafeedback(i):
    answers = [
        {
            "annotations": {
                "helpfulness": _annotation("5") | {"Type": ["1"], "Rationale For Rating": "So."},
                "honesty": _annotation(str(i % 5 + 1)),
                "instruction_following": _annotation("N/A"),
                "truthfulness": _annotation("4") | {"Type": ["None"], "Rationale For Rating": "So."},
            },
            "custom_system_prompt": "Be of help.",
            "principle": "helpfulness",
            "model": model,
            "response": f"{model} says {i}.",
            "critique": "Good.",
            "overall_score": score,
            "fine-grained_score": score / 2,
        }
        for model, score in (("alpaca-7b", 7.5), ("gpt-4", 9.0))
    ]
    names = [answer["model"] for answer in answers]
    about = {"source": "sharegpt", "correct_answers": ["None"], "incorrect_answers": ["None"]}
    return {"instruction": f"Say {i}.", "models": names, "completions": answers, **about}


def _oasst(text, role, replies=(), rank=None, quality=None):
    labels = {"spam": {"value": 0.0, "count": 3}}
    if quality is not None:
        labels["quality"] = {"value": quality, "count": 3}
    about = {"lang": "en", "deleted": False, "review_result": True, "synthetic": False, "labels": labels}
    return {"message_id": text, "text": text, "role": role, "rank": rank, "replies": list(replies), **about}


def oasst(i):
    deep = _oasst(f"You are welcome, {i}.", "assistant", quality=1.0, rank=0)
    thanks = _oasst(f"Thanks {i}.", "prompter", [deep])
    answers = [
        _oasst(f"Yes {i}", "assistant", [thanks], rank=0, quality=0.75),
        _oasst(f"No {i}", "assistant", rank=1, quality=0.25),
    ]
    return {
        "message_tree_id": str(i),
        "tree_state": "ready_for_export",
        "prompt": _oasst(f"{i}?", "prompter", answers),
    }


def pku(i):
    halves = {}
    for number, (text, safe) in enumerate((("No.", True), ("Sure.", False))):
        about = {"source": "Alpaca-7B", "severity_level": 0 if safe else 2, "harm_category": {"Violence": not safe}}
        halves |= {f"response_{number}": text, f"is_response_{number}_safe": safe}
        halves |= {f"response_{number}_{name}": value for name, value in about.items()}
    return {"prompt": f"Harm {i}!", **halves, "better_response_id": 1, "safer_response_id": 0}


def arena(i):
    return {
        "question_id": str(i),
        "model_a": "alpaca",
        "model_b": "vicuna",
        "winner": ("model_a", "model_b", "tie", "tie (bothbad)")[i % 4],
        "judge": "arena_user_1",
        "conversation_a": _messages(i, "Yes"),
        "conversation_b": _messages(i, "No"),
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1,
        "toxic_chat_tag": {"roberta-large": {"flagged": False, "probability": 0.01}},
    }


def nectar(i):
    answers = [{"answer": f"Answer {rank}", "model": f"model {rank}", "rank": float(rank)} for rank in (1, 2, 3)]
    prompt = f"\n\nHuman: {i}?\n\nAssistant: "
    about = {"turns": 1, "num_responses": 3, "source": ["lmsys-chat-1m"], "good_natured": True}
    return {"prompt": prompt, "answers": answers, **about}


def webgpt(i):
    quotes = {"title": ["Eggs (egg.com)"], "extract": ["An egg is boiled."]}
    halves = {}
    for number, score in ((0, 0.5), (1, -0.5)):
        tokens = {"prefix": [1, 2], "completion": [3]}
        halves |= {f"quotes_{number}": quotes, f"answer_{number}": f"Boil it {number} [1].", f"score_{number}": score}
        halves |= {f"tokens_{number}": tokens}
    return {"question": {"dataset": "eli5", "id": str(i), "full_text": f"An egg {i}?"}, **halves}


def tldr(i):
    info = {"id": f"t3_{i}", "post": f"It was {i}.", "title": "Hot", "subreddit": "tea", "site": None, "article": None}
    summaries = [{"text": f"{policy} {i}", "policy": policy, "note": "ok"} for policy in ("sup1", "ref")]
    about = {"worker": "w", "batch": "batch3", "split": "train", "extra": {"confidence": 8}}
    return {"info": info, "summaries": summaries, "choice": i % 2, **about}


def stack_exchange_paired(i):
    about = {"qid": i, "date": "2016/12/03", "metadata": ["https://meta.stackexchange.com/questions/1"]}
    return {"question": f"An egg {i}?", "response_j": "Boil it.", "response_k": "Dunno.", **about}


def _turn(i, role, content, parent, **more):
    return {
        "id": f"{i}-{role}", "parentId": parent, "childrenIds": [], "role": role, "content": content,
        "timestamp": 1704067200, **more,
    }  # fmt: skip


def open_webui(i):
    """Messages are keyed by ids of their own in every row, and the branch that is not rated is in the snapshot, too."""
    other = _turn(i, "assistant", "No", f"{i}-user") | {"id": f"{i}-other"}
    answer = _turn(i, "assistant", "Yes", f"{i}-user", model="llama3", done=True, annotation={"rating": 1})
    messages = {each["id"]: each for each in (_turn(i, "user", f"{i}?", None, models=["llama3"]), other, answer)}
    chat = {"title": "Talk", "models": ["llama3"], "history": {"messages": messages, "currentId": answer["id"]}}
    details = {"details": {"rating": i % 10 + 1}}
    return {
        "id": str(i), "user_id": "u", "version": 0, "type": "rating",
        "data": {"rating": 1 if i % 2 else -1, "model_id": "llama3", "sibling_model_ids": None, "tags": []} | details,
        "meta": {"model_id": "llama3", "message_id": answer["id"], "message_index": 2, "chat_id": f"c{i}"},
        "snapshot": {"chat": {"id": f"c{i}", "title": "Talk", "chat": chat, "archived": False}},
        "created_at": 1704067200,
    }  # fmt: skip


def langfuse(i):
    request = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"{i}?"}]
    reply = {"role": "assistant", "content": "Yes", "refusal": None, "annotations": []}
    about = {"id": str(i), "timestamp": "2026-01-01T00:00:00Z", "name": "chat", "tags": ["web"], "latency": 0.5}
    return {**about, "input": request, "output": reply, "metadata": {"a": [1]}, "user-feedback": [i % 2]}


def langsmith(i):
    def message(kind, content):
        made = {"content": content, "additional_kwargs": {}, "response_metadata": {}}
        return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", kind], "kwargs": made}

    replies = {"generations": [[{"text": "Yes", "type": "ChatGeneration", "message": message("AIMessage", "Yes")}]]}
    stats = {"user_score": {"n": 4, "avg": i % 5 / 4, "stdev": 0.0}}
    request = {"messages": [[message("SystemMessage", "Be kind."), message("HumanMessage", f"{i}?")]]}
    about = {"id": str(i), "name": "ChatOpenAI", "run_type": "llm", "error": None}
    return {**about, "inputs": request, "outputs": replies, "feedback_stats": stats}


def label_studio(i):
    result = {"id": "r", "from_name": "quality", "to_name": "answer", "type": "rating", "value": {"rating": i % 2}}
    about = {"id": 1, "completed_by": 1, "was_cancelled": False, "ground_truth": False, "lead_time": 4.2}
    task = {"id": i, "data": {"prompt": f"{i}?", "answer": "Yes", "model_number": 3}, "predictions": [], "project": 1}
    return {**task, "annotations": [{**about, "result": [result]}]}


def gemini(i):
    def turn(role, text):
        return {"role": role, "parts": [{"text": text}]}

    scored = [{"score": score, "completion": turn("model", text)} for score, text in ((1.0, "Yes"), (0.0, "No"))]
    return {"contents": [turn("user", f"{i}?")], "completions": scored, "systemInstruction": turn("system", "Be kind.")}


SAMPLES = {
    "kto": lambda i: {"prompt": _messages(i)[:1], "completion": _messages(i)[1:], "label": i % 2 == 0},
    "messages": lambda i: {"messages": _messages(i), "label": i % 2},
    "turns": lambda i: {"messages": _messages(i, label=1) + _messages(i, "No", label=0)},
    "sharegpt": lambda i: {"id": str(i), "conversations": _from(("human", f"{i}?"), ("gpt", "Yes"))},
    "alpaca": lambda i: {"instruction": "Add.", "input": f"{i} + {i}", "output": str(2 * i), "text": "Below is …"},
    "stepwise": lambda i: {"prompt": f"{i} + 1 + 1?", "completions": [str(i + 1), str(i)], "labels": [True, False]},
    "helpsteer": lambda i: {
        "prompt": f"{i}?", "response": "Yes", "helpfulness": i % 5, "correctness": 4, "coherence": 3, "complexity": 2,
        "verbosity": 1,
    },
    "ultrafeedback": ultrafeedback,
    "oasst": oasst,
    "pku-saferlhf": pku,
    "beavertails": lambda i: {
        "prompt": f"Harm {i}!", "response": "Sure.", "category": {"violence": True}, "is_safe": i % 2 == 0
    },
    "arena": arena,
    "nectar": nectar,
    "webgpt": webgpt,
    "tldr": tldr,
    "stack-exchange-paired": stack_exchange_paired,
    "helpsteer3": lambda i: {
        "domain": "general", "language": "english", "context": _messages(i)[:1], "response1": "Yes", "response2": "No",
        "overall_preference": i % 7 - 3, "individual_preference": [{"score": -1, "reasoning": "So.", "feedback": ""}],
    },
    "distilabel": lambda i: {
        "instruction": f"{i}?", "generations": ["Yes", "No"], "ratings": [5, i % 5], "generation_models": ["a", "b"],
        "rationales": ["So.", "So."], "model_name": "judge",
    },
    "openai": lambda i: {
        "input": {"messages": _messages(i)[:1], "tools": [], "parallel_tool_calls": True},
        "preferred_output": _messages(i)[1:], "non_preferred_output": _messages(i, "No")[1:],
    },
    "gemini": gemini,
    "open-webui": open_webui,
    "langfuse": langfuse,
    "langsmith": langsmith,
    "label-studio": label_studio,
}  # fmt: skip
