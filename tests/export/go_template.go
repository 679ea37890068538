// Renders templates with Go's own text/template, on Ollama's data: cases as JSON in, texts as JSON out.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type example struct {
	Template string
	Messages []message
}

func render(asked example) string {
	system, prompt := []string{}, ""
	for _, each := range asked.Messages {
		switch each.Role {
		case "system":
			system = append(system, each.Content)
		case "user":
			prompt = each.Content
		}
	}
	data := map[string]any{
		"System":   strings.Join(system, "\n\n"),
		"Messages": asked.Messages,
		"Prompt":   prompt,
	}
	text := strings.Builder{}
	if err := template.Must(template.New("").Parse(asked.Template)).Execute(&text, data); err != nil {
		panic(err)
	}
	return text.String()
}

func main() {
	examples, texts := []example{}, []string{}
	if err := json.NewDecoder(os.Stdin).Decode(&examples); err != nil {
		panic(err)
	}
	for _, each := range examples {
		texts = append(texts, render(each))
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
