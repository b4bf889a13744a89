from __future__ import annotations

from configs.prompts import NIH_PROMPTS, STRUCTURED_PROMPTS, choose


def test_prompts_follow_the_reports_that_a_model_has_read() -> None:
    recipe = {"nodule": {"positive": ("A spot.",)}}
    chosen, source = choose(["nodule", "Effusion", "Mass", "unheard of"], recipe, "structured")
    assert chosen["nodule"] == recipe["nodule"] and chosen["Mass"] == NIH_PROMPTS["Mass"]
    assert chosen["Effusion"] == STRUCTURED_PROMPTS["effusion"] and "unheard of" not in chosen
    assert source == "recipe (nodule), structured reports (Effusion), configs/prompts.py (Mass)"
    assert choose(["Effusion"], {}, "raw") == ({"Effusion": NIH_PROMPTS["Effusion"]}, "configs/prompts.py")
    assert choose(["Effusion"], {}, "structured")[1] == "structured reports"
    assert choose(["unheard of"], {}, "structured") == ({}, "")
